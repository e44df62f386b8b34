"""Tiny models built with the reference implementations, in the published layout.

Every tensor is drawn at random: the classes' own starting values (norms of one, biases of zero) would hide a tensor
that is ignored or taken for another. Weights are scaled by their fan-in, so that values stay about 1 from layer to
layer and a relative error means something at every depth.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from mflux.backend import mx
from support.tokenizers import write_trained_clip_tokenizer, write_trained_t5_tokenizer

# What one component may differ by (relative L2).
COMPONENT = 1e-5
# What a whole denoising loop may differ by.
LOOP = 1e-4


# ---- comparing


def relative_error(ours, theirs) -> float:
    """L2 distance over the reference's L2 norm; a differing shape or a value that is not finite is an error itself."""
    ours, theirs = as_numpy(ours).astype(np.float64), as_numpy(theirs).astype(np.float64)
    assert ours.shape == theirs.shape, f"{ours.shape} instead of {theirs.shape}"
    assert np.isfinite(theirs).all(), "the reference's own result is not finite"
    assert np.isfinite(ours).all()
    assert np.linalg.norm(theirs) > 1e-3 * np.sqrt(theirs.size), "a reference of nearly nothing shows nothing"
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def as_numpy(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        return values.detach().numpy()
    if isinstance(values, mx.array):
        return np.array(values.astype(mx.float32))
    return np.asarray(values)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- drawing weights


@torch.no_grad()
def draw(module: torch.nn.Module, seed: int, gains: Mapping[str, float] | None = None) -> torch.nn.Module:
    """Draw every parameter of a reference module; `gains` makes those larger whose name ends so."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, torch.nn.Embedding)}
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            values = 0.3 * values
        elif name in embeddings:
            pass
        elif parameter.ndim == 1:
            values = 1 + 0.3 * values
        else:
            values = values / parameter[0].numel() ** 0.5
        for ending, gain in (gains or {}).items():
            if name.endswith(ending):
                values = gain * values
        parameter.copy_(values)
    return module.eval().requires_grad_(False)


# ---- components. Defaults are small; a test changes what it is about.

CLIP = dict(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=20,
    hidden_act="quick_gelu",
    eos_token_id=2,
    bos_token_id=0,
    pad_token_id=1,
)
T5 = dict(
    vocab_size=64,
    d_model=24,
    d_kv=8,
    d_ff=40,
    num_layers=2,
    num_heads=3,
    feed_forward_proj="gated-gelu",
)
VAE = dict(
    block_out_channels=[8, 16],
    layers_per_block=1,
    norm_num_groups=4,
    latent_channels=4,
    use_quant_conv=False,
    use_post_quant_conv=False,
    scaling_factor=0.3611,
    shift_factor=0.1159,
)
TRANSFORMER = dict(
    in_channels=16,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    guidance_embeds=False,
    axes_dims_rope=[4, 6, 6],
)


def clip_model(seed: int = 0, **changes) -> CLIPTextModel:
    return draw(CLIPTextModel(CLIPTextConfig(**CLIP | changes)), seed)


def t5_model(seed: int = 0, **changes) -> T5EncoderModel:
    config = T5Config(**T5 | changes, tie_word_embeddings=False, is_encoder_decoder=False, use_cache=False)
    # T5 does not scale its attention: a trained one has learned to keep the products small.
    return draw(T5EncoderModel(config), seed, gains={"SelfAttention.q.weight": config.d_kv**-0.5})


def vae_model(seed: int = 0, **changes) -> AutoencoderKL:
    settings = VAE | changes
    levels = len(settings["block_out_channels"])
    model = AutoencoderKL(
        **settings,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    # Pictures that are not mostly clipped.
    return draw(model, seed, gains={"decoder.conv_out.weight": 0.3})


def transformer_model(seed: int = 0, **changes) -> FluxTransformer2DModel:
    return draw(FluxTransformer2DModel(**TRANSFORMER | changes), seed)


def save_clip(model: CLIPTextModel, folder: Path, *, prefix: str = "text_model.") -> Path:
    """As published, with every name under `text_model.`; files saved by transformers 5 have `prefix=""`."""
    tensors = {prefix + name.removeprefix("text_model."): value for name, value in model.state_dict().items()}
    return _save(model, tensors, folder)


def save_t5(model: T5EncoderModel, folder: Path, *, embedding: Iterable[str] = ("shared.weight",)) -> Path:
    """With the token embedding under the names that are asked for: files hold one of two, or both."""
    tensors = dict(model.state_dict())
    tokens = tensors["shared.weight"]
    tensors = {name: value for name, value in tensors.items() if "embed_tokens" not in name and name != "shared.weight"}
    return _save(model, tensors | {name: tokens.clone() for name in embedding}, folder)


def _save(model, tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [type(model).__name__]}))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


def save(model, folder: Path, **options) -> Path:
    """A component in the published layout, whatever it is."""
    if isinstance(model, CLIPTextModel):
        return save_clip(model, folder, **options)
    if isinstance(model, T5EncoderModel):
        return save_t5(model, folder, **options)
    model.save_pretrained(folder, **options)
    return folder


# ---- whole pipelines

SCHEDULERS = {
    "static": dict(use_dynamic_shifting=False, shift=1.0),
    "shifted": dict(use_dynamic_shifting=False, shift=3.0),
    "dynamic": dict(use_dynamic_shifting=True, shift=3.0),
}


def save_scheduler(folder: Path, **changes) -> Path:
    FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        base_shift=0.5,
        max_shift=1.15,
        **changes,
    ).save_pretrained(folder)
    return folder


def sharpen(autoencoder: AutoencoderKL) -> None:
    """Let the posterior be its mean: some pipelines draw from it, and mflux takes the mean."""
    half = autoencoder.encoder.conv_out.out_channels // 2
    autoencoder.encoder.conv_out.weight[half:] = 0
    autoencoder.encoder.conv_out.bias[half:] = -30


def write_flux(
    folder: Path,
    *,
    seed: int = 0,
    guidance: bool = False,
    scheduler: str = "static",
    eos_token_id: int | None = None,
    heads: int = 2,
    layers: tuple[int, int] = (1, 2),
    text_width: int = 24,
    pooled_width: int = 20,
    clip_options: dict | None = None,
    t5_form: str = "whitespace",
    channels: int = 64,
    sharp: bool = False,
    **vae,
) -> Path:
    """A complete tiny FLUX.1 folder: pictures are 8 pixels a latent and 16 channels deep, as FLUX.1's are.

    Args:
        eos_token_id: what CLIP's configuration says; the tokenizer's own end token unless given.
        channels: of the transformer's input; what is beyond a picture's own 64 comes from the autoencoder.
        sharp: whether the autoencoder's posterior is so sharp that a draw from it is its mean; true with such channels.
    """
    end = write_trained_clip_tokenizer(folder / "tokenizer", length=40)["<|endoftext|>"]
    pieces = len(write_trained_t5_tokenizer(folder / "tokenizer_2", form=t5_form))
    clip = clip_model(
        seed + 1,
        vocab_size=end + 1,
        hidden_size=pooled_width,
        num_attention_heads=2,
        max_position_embeddings=40,
        eos_token_id=end if eos_token_id is None else eos_token_id,
    )
    save_clip(clip, folder / "text_encoder", **clip_options or {})
    save_t5(t5_model(seed + 2, vocab_size=pieces, d_model=text_width), folder / "text_encoder_2")
    settings = dict(block_out_channels=[8, 8, 16, 16], latent_channels=16)
    autoencoder = vae_model(seed + 3, **settings | vae)
    if sharp or channels > 64:
        sharpen(autoencoder)
    save(autoencoder, folder / "vae")
    transformer = transformer_model(
        seed + 4,
        in_channels=channels,
        out_channels=64,
        num_layers=layers[0],
        num_single_layers=layers[1],
        num_attention_heads=heads,
        joint_attention_dim=text_width,
        pooled_projection_dim=pooled_width,
        guidance_embeds=guidance,
    )
    save(transformer, folder / "transformer")
    save_scheduler(folder / "scheduler", **SCHEDULERS[scheduler])
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder

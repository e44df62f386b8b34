"""FLUX.1: what the tests of all families need to know of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from support.cases import Component, Tiny, Training

from mflux.backend import mx
from mflux.models.common.networks.autoencoders.kl import AutoencoderKL
from mflux.models.common.networks.text_encoders.clip import CLIPTextEncoder
from mflux.models.common.networks.text_encoders.t5 import T5Encoder
from mflux.models.flux.model.transformer import FluxTransformer, latent_image_ids


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def token_ids(batch: int, length: int, vocabulary: int, end: int | None = None) -> np.ndarray:
    """Random ids from 3 on, with the end token at another place in each row."""
    ids = np.random.default_rng(0).integers(3, min(vocabulary, 59), (batch, length))
    if end is not None:
        for row in range(batch):
            ids[row, length // 2 + row] = end
    return ids


# ---- CLIP


def clip_reference(**settings):
    from support.reference import CLIP
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**CLIP | settings))


def save_clip(model, folder: Path) -> Path:
    from support.reference import save_clip

    return save_clip(model, folder)


def clip_inputs(model, number: int) -> dict:
    length = (11, model.config.max_position_embeddings)[number]
    return {"ids": token_ids((1, 3)[number], length, model.config.vocab_size, end=model.config.vocab_size - 1)}


def run_clip(module, inputs):
    return module(mx.array(inputs["ids"]))


def run_clip_reference(model, inputs):
    import torch

    result = model(torch.tensor(inputs["ids"]))
    return [result.last_hidden_state, result.pooler_output]


def clip_full_size(config):
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


def clip_name(name: str) -> str:
    """transformers 5 takes the files' prefix off on loading."""
    return "text_model." + name.removeprefix("text_model.")


# ---- T5


def t5_reference(**settings):
    from support.reference import T5
    from transformers import T5Config, T5EncoderModel

    config = T5Config(**T5 | settings, tie_word_embeddings=False, is_encoder_decoder=False, use_cache=False)
    return T5EncoderModel(config)


def save_t5(model, folder: Path) -> Path:
    from support.reference import save_t5

    return save_t5(model, folder)


def t5_inputs(model, number: int) -> dict:
    # 170 tokens are further apart than the 128 that the buckets tell from each other.
    return {"ids": token_ids((3, 1)[number], (13, 170)[number], model.config.vocab_size)}


def run_t5(module, inputs):
    return [module(mx.array(inputs["ids"]))]


def run_t5_reference(model, inputs):
    import torch

    return [model(torch.tensor(inputs["ids"])).last_hidden_state]


def t5_full_size(config):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**config))


# ---- autoencoder


def vae_reference(**settings):
    from diffusers import AutoencoderKL as Reference
    from support.reference import VAE

    settings = VAE | settings
    levels = len(settings["block_out_channels"])
    types = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return Reference(**settings, **types)


def vae_inputs(model, number: int) -> dict:
    batch, height, width = ((1, 24, 40), (3, 32, 16))[number]
    shrink = 2 ** (len(model.config.block_out_channels) - 1)
    return {
        "image": np.tanh(normal(1, batch, model.config.in_channels, height, width)),
        "latents": normal(2, batch, model.config.latent_channels, height // shrink, width // shrink),
    }


def run_vae(module, inputs):
    yield module.encode(mx.array(inputs["image"]))
    yield module.decode(mx.array(inputs["latents"]))


def run_vae_reference(model, inputs):
    import torch

    shift, factor = model.config.shift_factor or 0.0, model.config.scaling_factor
    mean = (model.encode(torch.tensor(inputs["image"])).latent_dist.mode() - shift) * factor
    return [mean, model.decode(torch.tensor(inputs["latents"]) / factor + shift).sample]


def vae_full_size(config):
    from diffusers import AutoencoderKL as Reference

    return Reference.from_config(config)


# ---- transformer


def transformer_reference(**settings):
    from diffusers import FluxTransformer2DModel
    from support.reference import TRANSFORMER

    return FluxTransformer2DModel(**TRANSFORMER | settings)


def transformer_inputs(model, number: int) -> dict:
    batch, rows, columns, length = ((1, 3, 5, 7), (3, 6, 2, 11))[number]
    config = model.config
    inputs = {
        "latents": normal(1, batch, rows * columns, config.in_channels),
        "text": normal(2, batch, length, config.joint_attention_dim),
        "pooled": normal(3, batch, config.pooled_projection_dim),
        # One noise level and guidance for each sample, so that none can stand for all.
        "sigma": np.linspace(0.9, 0.3, batch, dtype=np.float32),
        "grid": (rows, columns),
    }
    if config.guidance_embeds:
        inputs["guidance"] = np.linspace(3.5, 2.0, batch, dtype=np.float32)
    return inputs


def run_transformer(module, inputs):
    prediction = module(
        mx.array(inputs["latents"]),
        sigma=mx.array(inputs["sigma"]),
        prompt_embeds=mx.array(inputs["text"]),
        pooled_prompt_embeds=mx.array(inputs["pooled"]),
        image_ids=latent_image_ids(*inputs["grid"]),
        guidance=mx.array(inputs["guidance"]) if "guidance" in inputs else None,
    )
    return [prediction]


def run_transformer_reference(model, inputs):
    import torch
    from diffusers import FluxPipeline

    prediction = model(
        hidden_states=torch.tensor(inputs["latents"]),
        encoder_hidden_states=torch.tensor(inputs["text"]),
        pooled_projections=torch.tensor(inputs["pooled"]),
        timestep=torch.tensor(inputs["sigma"]),
        guidance=torch.tensor(inputs["guidance"]) if "guidance" in inputs else None,
        img_ids=FluxPipeline._prepare_latent_image_ids(1, *inputs["grid"], "cpu", torch.float32),
        txt_ids=torch.zeros(inputs["text"].shape[1], 3),
    )
    return [prediction.sample]


def transformer_full_size(config):
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_config(config)


# ---- pairs that cannot change the output


def same_sum_in_the_condition(first: str, second: str) -> bool:
    """The embeddings of time, guidance and prompt are added up, and with them the biases of their last layers."""
    return all(name.startswith("time_text_embed.") and name.endswith(".linear_2.bias") for name in (first, second))


def key_biases(first: str, second: str) -> bool:
    """A key's bias adds the same to a query's product with every key, and softmax takes out what all have in common."""
    return all(name.endswith((".k_proj.bias", ".to_k.bias")) for name in (first, second))


def same_sum_in_a_resnet(first: str, second: str) -> bool:
    """A residual block adds its last convolution to its shortcut, and with them their biases."""
    ends = {name.rpartition(".resnets.")[2].split(".", 1)[1] for name in (first, second) if ".resnets." in name}
    blocks = {name.removesuffix(".conv2.bias").removesuffix(".conv_shortcut.bias") for name in (first, second)}
    return ends == {"conv2.bias", "conv_shortcut.bias"} and len(blocks) == 1


# All widths equal where the architecture allows it, so that as many tensors as can be are of the same shape.
_NARROW = dict(
    in_channels=16, attention_head_dim=8, num_attention_heads=2, axes_dims_rope=[2, 2, 4], joint_attention_dim=16,
    pooled_projection_dim=16,
)  # fmt: skip
_TRANSFORMER = dict(
    module=FluxTransformer,
    reference=transformer_reference,
    inputs=transformer_inputs,
    ours=run_transformer,
    theirs=run_transformer_reference,
    neutral=(same_sum_in_the_condition,),
)
_VAE = dict(
    module=AutoencoderKL,
    reference=vae_reference,
    inputs=vae_inputs,
    ours=run_vae,
    theirs=run_vae_reference,
    gains={"decoder.conv_out.weight": 0.3},
    neutral=(key_biases, same_sum_in_a_resnet),
)
_T5 = dict(
    module=T5Encoder,
    reference=t5_reference,
    inputs=t5_inputs,
    ours=run_t5,
    theirs=run_t5_reference,
    # T5 does not scale its attention: a trained one has learned to keep the products small.
    gains={"SelfAttention.q.weight": 0.35},
    save=save_t5,
)

COMPONENTS = (
    Component(
        name="text_encoder",
        module=CLIPTextEncoder,
        reference=clip_reference,
        settings={
            "pooled by the highest id": dict(eos_token_id=2),
            "pooled at the end token": dict(eos_token_id=63, hidden_size=40, num_attention_heads=5),
            "gelu": dict(eos_token_id=63, hidden_act="gelu", num_hidden_layers=3, intermediate_size=32),
        },
        inputs=clip_inputs,
        ours=run_clip,
        theirs=run_clip_reference,
        save=save_clip,
        published={"FLUX.1/text_encoder": 123_060_480},
        full_size=clip_full_size,
        published_name=clip_name,
        swap=dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, eos_token_id=63),
        neutral=(key_biases,),
        neutral_pairs=1,
    ),
    Component(
        name="text_encoder_2",
        settings={
            "gated, as published": dict(feed_forward_proj="gated-gelu"),
            "gated-silu, more heads": dict(feed_forward_proj="gated-silu", d_model=40, num_heads=5, d_kv=6),
            "other buckets": dict(relative_attention_num_buckets=12, relative_attention_max_distance=20),
        },
        published={"FLUX.1/text_encoder_2": 4_762_310_656},
        full_size=t5_full_size,
        swap=dict(d_model=16, d_kv=8, num_heads=2, d_ff=16, num_layers=3),
        **_T5,
    ),
    Component(
        name="text_encoder_2, not gated",
        settings={
            "relu": dict(feed_forward_proj="relu", d_ff=64, num_layers=1),
            "gelu": dict(feed_forward_proj="gelu", layer_norm_epsilon=1e-3),
        },
        swap=dict(d_model=16, d_kv=8, num_heads=2, d_ff=16, num_layers=3, feed_forward_proj="relu"),
        **_T5,
    ),
    Component(
        name="vae",
        settings={
            "as FLUX.1's": dict(block_out_channels=[8, 8, 16, 16], layers_per_block=2, latent_channels=16),
            "quantization convolutions": dict(use_quant_conv=True, use_post_quant_conv=True),
            "one quantization convolution": dict(
                use_quant_conv=True, block_out_channels=[12, 24, 12], norm_num_groups=3
            ),
            "the other": dict(use_post_quant_conv=True, shift_factor=None, scaling_factor=0.18215, norm_num_groups=8),
            "grey": dict(in_channels=1, out_channels=2, latent_channels=3),
        },
        published={"FLUX.1/vae": 83_819_683},
        full_size=vae_full_size,
        swap=dict(block_out_channels=[4, 8], norm_num_groups=2, use_quant_conv=True, use_post_quant_conv=True),
        neutral_pairs=3,
        **_VAE,
    ),
    Component(
        name="vae without attention",
        settings={
            "two": dict(mid_block_add_attention=False, norm_num_groups=2, layers_per_block=2),
            "three": dict(mid_block_add_attention=False, block_out_channels=[8, 12, 4], norm_num_groups=4),
        },
        swap=dict(block_out_channels=[4, 8], norm_num_groups=2, use_quant_conv=True, mid_block_add_attention=False),
        neutral_pairs=2,
        **_VAE,
    ),
    Component(
        name="transformer",
        settings={
            "no guidance": dict(guidance_embeds=False),
            "only double blocks": dict(num_single_layers=0, num_layers=3, joint_attention_dim=16),
            "other axes": dict(attention_head_dim=20, axes_dims_rope=[2, 8, 10], patch_size=2, pooled_projection_dim=7),
        },
        published={
            "FLUX.1-schnell/transformer": 11_891_178_560,
            "FLUX.1-dev/transformer": 11_901_408_320,
            "FLUX.1-Kontext-dev/transformer": 11_901_408_320,
            "FLUX.1-Krea-dev/transformer": 11_901_408_320,
            "FLUX.1-Fill-dev/transformer": 11_902_391_360,
            "FLUX.1-Depth-dev/transformer": 11_901_604_928,
        },
        full_size=transformer_full_size,
        swap=_NARROW | dict(num_layers=2, num_single_layers=1),
        neutral_pairs=1,
        **_TRANSFORMER,
    ),
    Component(
        name="transformer with guidance",
        settings={
            "guidance": dict(guidance_embeds=True, num_attention_heads=3, num_layers=1, num_single_layers=3),
            "only single blocks": dict(num_layers=0, out_channels=12, guidance_embeds=True),
        },
        swap=_NARROW | dict(guidance_embeds=True, num_layers=1, num_single_layers=2),
        neutral_pairs=3,
        **_TRANSFORMER,
    ),
)


def write_tiny(folder: Path, *, wide: bool = False, guidance: bool = False) -> Path:
    from support.tiny import write_checkpoint

    return write_checkpoint(folder, seed=1, guidance=guidance, wide=wide)


TINY = (
    Tiny(
        write=write_tiny,
        command="generate",
        base_model="schnell",
        pipeline="mflux.models.flux.variants.txt2img.flux:Flux1",
    ),
)


# ---- training

# As many tokens as schnell and dev read.
_WORDS = {"schnell": 256, "dev": 512}


def _encoded(folder: Path, image, prompt: str, width: int, height: int, source):
    import torch

    pipeline = _pipeline(folder)
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt(
            prompt,
            None,
            max_sequence_length=_WORDS["dev" if pipeline.transformer.config.guidance_embeds else "schnell"],
        )
        pixels = pipeline.image_processor.preprocess(image)
        vae = pipeline.vae
        latents = (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    packed = pipeline._pack_latents(latents, 1, 16, height // 8, width // 8)
    return packed, {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


@cache
def _pipeline(folder: Path):
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(folder)


def _velocity(transformer, latents, sigma, cond, width: int, height: int, guidance: float):
    import torch
    from diffusers import FluxPipeline

    return transformer(
        hidden_states=latents,
        timestep=torch.tensor([sigma]),
        guidance=torch.tensor([guidance]) if transformer.config.guidance_embeds else None,
        encoder_hidden_states=cond["prompt_embeds"],
        pooled_projections=cond["pooled_prompt_embeds"],
        txt_ids=torch.zeros(cond["prompt_embeds"].shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 16, width // 16, "cpu", torch.float32),
    ).sample


def _training(name: str, model: str, guidance: float = 0.0, **settings) -> Training:
    def write(folder: Path) -> Path:
        from support.reference import write_flux

        return write_flux(folder, guidance=model == "dev", **settings)

    return Training(
        name=name,
        model=model,
        write=write,
        pipeline="FluxPipeline",
        transformer="FluxTransformer2DModel",
        targets=(
            {"module_path": "transformer_blocks.{block}.attn.to_q", "blocks": "all", "rank": 4, "alpha": 8},
            # 0.24's name of a layer.
            {"module_path": "transformer_blocks.{block}.ff.linear1", "blocks": {"start": 0, "end": 1}, "rank": 2},
            {"module_path": "transformer_blocks.0.norm1.linear", "rank": 3, "alpha": 1.5},
            {"module_path": "single_transformer_blocks.{block}.attn.to_v", "blocks": {"indices": [1]}, "rank": 4},
            {"module_path": "single_transformer_blocks.{block}.proj_out", "blocks": "all", "rank": 4, "alpha": 6},
            {"module_path": "proj_out", "rank": 2, "alpha": 5},
            {"module_path": "time_text_embed.timestep_embedder.linear_1", "rank": 2},
        ),
        encoded=_encoded,
        velocity=_velocity,
        guidance=guidance,
    )


TRAINING = (
    _training("training without guidance", "schnell"),
    _training("training with guidance", "dev", 2.5, scheduler="dynamic", heads=3, layers=(2, 2)),
)

"""FLUX.2 klein: what the tests of all families need to know of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from support.cases import Component, Pipeline, Settings, Tiny, Training
from support.images import generated, photo, pipeline_reference
from support.tokenizers import write_json, write_qwen_tokenizer

from families.flux.cases import key_biases, normal, same_sum_in_a_resnet, token_ids
from mflux.backend import mx
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.autoencoders.flux2 import AutoencoderKLFlux2
from mflux.models.flux2.model.text_encoder import KleinTextEncoder, SmallQwen3, SmallTextAdapter
from mflux.models.flux2.model.transformer import Flux2Transformer, grid_ids, text_ids

# ---- text encoder

QWEN3 = dict(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=28,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
)
# What the published files hold above the highest hidden state that is asked for.
_ABOVE = tuple(
    f".layers.{layer}.{leaf}.weight"
    for layer in range(27, 36)
    for leaf in (
        "input_layernorm", "post_attention_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
        "self_attn.k_norm", "self_attn.q_norm", "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj",
        "self_attn.v_proj",
    )
)  # fmt: skip


def qwen3_reference(**settings):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**QWEN3 | settings))


def qwen3_inputs(model, number: int) -> dict:
    """Prompts of different lengths, padded."""
    batch, length = ((1, 9), (3, 12))[number]
    mask = (np.arange(length) < (length - 2 - np.arange(batch))[:, None]).astype(np.int32)
    return {"ids": token_ids(batch, length, model.config.vocab_size), "mask": mask}


def run_qwen3(module, inputs):
    return [module(mx.array(inputs["ids"]), mx.array(inputs["mask"]))]


def run_qwen3_reference(states):
    def run(model, inputs):
        import torch

        ids, mask = torch.tensor(inputs["ids"]), torch.tensor(inputs["mask"])
        found = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return [torch.cat([found[state] for state in states], dim=-1)]

    return run


def qwen3_full_size(config):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**config))


# ---- the small text encoder's adapter

ADAPTER = dict(
    hidden_size=8, hidden_states=6, out_features=20, mlp_features=24, attention_features=16, attention_heads=2,
    attention_blocks=2, max_length=14,
)  # fmt: skip


def adapter_reference(**settings):
    """Its authors publish weights only; this is what they are for, written with torch's own layers."""
    import torch
    from torch import nn
    from torch.nn import functional

    sizes = SimpleNamespace(**ADAPTER | settings)
    width = sizes.hidden_size * sizes.hidden_states

    class PerStateNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.all = nn.LayerNorm(width)

        def forward(self, x):
            parts = [functional.layer_norm(part, part.shape[-1:]) for part in x.chunk(sizes.hidden_states, dim=-1)]
            return self.all(torch.cat(parts, dim=-1))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            features = sizes.attention_features
            self.n1, self.n2 = nn.LayerNorm(features), nn.LayerNorm(features)
            self.attn = nn.MultiheadAttention(features, sizes.attention_heads, batch_first=True)
            self.ffn = nn.Sequential(
                nn.Linear(features, 4 * features), nn.GELU("tanh"), nn.Linear(4 * features, features)
            )

        def forward(self, x):
            y = self.n1(x)
            x = x + self.attn(y, y, y)[0]
            return x + self.ffn(self.n2(x))

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            features = sizes.attention_features
            self.norm, self.inp = nn.LayerNorm(width), nn.Linear(width, features)
            self.pos = nn.Parameter(torch.empty(1, sizes.max_length, features))
            self.blocks = nn.Sequential(*(Block() for _ in range(sizes.attention_blocks)))
            self.out = nn.Linear(features, sizes.out_features)

        def forward(self, x):
            return self.out(self.blocks(self.inp(self.norm(x)) + self.pos[:, : x.shape[1]]))

    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            hidden = sizes.mlp_features
            self.config = sizes
            self.mlp = nn.Sequential(
                PerStateNorm(), nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, hidden), nn.GELU("tanh"),
                nn.Linear(hidden, sizes.out_features),
            )  # fmt: skip
            self.attn = Mixer()

        def forward(self, x):
            return self.mlp(x) + self.attn(x)

    return Adapter()


def save_adapter(model, folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(vars(model.config)))
    return folder


def adapter_inputs(model, number: int) -> dict:
    batch, length = ((1, 9), (3, model.config.max_length))[number]
    return {"states": normal(1, batch, length, model.config.hidden_size * model.config.hidden_states)}


def run_adapter(module, inputs):
    return [module(mx.array(inputs["states"]))]


def run_adapter_reference(model, inputs):
    import torch

    return [model(torch.tensor(inputs["states"]))]


# ---- autoencoder


def vae_reference(**settings):
    import torch
    from diffusers import AutoencoderKLFlux2 as Reference
    from support.reference import VAE

    kept = {
        name: VAE[name] for name in ("block_out_channels", "layers_per_block", "norm_num_groups", "latent_channels")
    }
    settings = kept | settings
    levels = len(settings["block_out_channels"])
    types = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    model = Reference(**settings, **types)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for statistic in (model.bn.running_mean, model.bn.running_var):
            statistic.copy_(torch.rand(statistic.shape, generator=generator) + 0.2)
    return model


def vae_inputs(model, number: int) -> dict:
    batch, height, width = ((1, 24, 40), (3, 32, 16))[number]
    side = model.config.patch_size[0]
    shrink = side * 2 ** (len(model.config.block_out_channels) - 1)
    return {
        "image": np.tanh(normal(1, batch, model.config.in_channels, height, width)),
        "latents": normal(2, batch, side**2 * model.config.latent_channels, height // shrink, width // shrink),
    }


def run_vae(module, inputs):
    yield module.encode(mx.array(inputs["image"]))
    yield module.decode(mx.array(inputs["latents"]))


def run_vae_reference(model, inputs):
    import torch
    from diffusers import Flux2KleinPipeline

    # Of the pipeline nothing but these methods, which ask for nothing but the autoencoder.
    pipeline = SimpleNamespace(vae=model, _patchify_latents=Flux2KleinPipeline._patchify_latents)
    encoded = Flux2KleinPipeline._encode_vae_image(pipeline, torch.tensor(inputs["image"]), None)
    mean = model.bn.running_mean.view(1, -1, 1, 1)
    deviation = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps)
    latents = Flux2KleinPipeline._unpatchify_latents(torch.tensor(inputs["latents"]) * deviation + mean)
    return [encoded, model.decode(latents).sample]


def vae_full_size(config):
    from diffusers import AutoencoderKLFlux2 as Reference

    return Reference.from_config(config)


# ---- transformer

TRANSFORMER = dict(
    in_channels=16,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    timestep_guidance_channels=32,
    axes_dims_rope=[4, 4, 4, 4],
    guidance_embeds=False,
)


def transformer_reference(**settings):
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(**TRANSFORMER | settings)


def transformer_inputs(model, number: int) -> dict:
    """A picture with one reference, or with two of other sizes."""
    batch, grid, length, references = (
        (1, (3, 5), 7, [(2, 3)]),
        (3, (6, 2), 11, [(4, 3), (1, 5)]),
    )[number]
    config = model.config
    tokens = sum(rows * columns for rows, columns in references)
    return {
        "latents": normal(1, batch, grid[0] * grid[1], config.in_channels),
        "text": normal(2, batch, length, config.joint_attention_dim),
        "references": normal(3, 1, tokens, config.in_channels),
        # One noise level for each sample, so that none can stand for all.
        "sigma": np.linspace(0.9, 0.3, batch, dtype=np.float32),
        "grids": np.array([grid, *references]),
    }


def ids(inputs) -> tuple[mx.array, mx.array, mx.array]:
    """Positions of the picture, of the references and of the text."""
    grid, *references = inputs["grids"].tolist()
    placed = [grid_ids(*size, time=10 + 10 * number) for number, size in enumerate(references)]
    return grid_ids(*grid), mx.concatenate(placed), text_ids(inputs["text"].shape[1])


def run_transformer(module, inputs):
    """Without references, with them beside the picture, and with what is kept of them."""
    image, reference, text = ids(inputs)
    latents, references = mx.array(inputs["latents"]), mx.array(inputs["references"])
    given = dict(sigma=mx.array(inputs["sigma"]), prompt_embeds=mx.array(inputs["text"]), text_ids=text)
    yield module(latents, image_ids=image, **given)
    beside = mx.broadcast_to(references, (latents.shape[0], *references.shape[1:]))
    yield module(mx.concatenate([latents, beside], axis=1), image_ids=mx.concatenate([image, reference]), **given)
    kept = module.keep(references, reference)
    yield module(latents, image_ids=image, references=kept, **given)
    again = given | {"sigma": given["sigma"] / 2}
    yield module(latents[:, ::-1], image_ids=image, references=kept, **again)


def run_transformer_reference(model, inputs):
    import torch
    from diffusers import Flux2KleinPipeline
    from diffusers.models.transformers.transformer_flux2 import (
        Flux2KVAttnProcessor,
        Flux2KVParallelSelfAttnProcessor,
    )

    (rows, columns), *sizes = inputs["grids"].tolist()
    latents, references = torch.tensor(inputs["latents"]), torch.tensor(inputs["references"])
    references = references.expand(latents.shape[0], -1, -1)
    text, sigma = torch.tensor(inputs["text"]), torch.tensor(inputs["sigma"])
    given = dict(encoder_hidden_states=text, txt_ids=Flux2KleinPipeline._prepare_text_ids(text), return_dict=False)
    image_ids = Flux2KleinPipeline._prepare_latent_ids(torch.empty(latents.shape[0], 1, rows, columns))
    reference_ids = Flux2KleinPipeline._prepare_image_ids([torch.empty(1, 1, *size) for size in sizes])
    reference_ids = reference_ids.expand(latents.shape[0], -1, -1)
    (plain,) = model(latents, timestep=sigma, img_ids=image_ids, **given)
    (beside,) = model(
        torch.cat([latents, references], dim=1),
        timestep=sigma,
        img_ids=torch.cat([image_ids, reference_ids], dim=1),
        **given,
    )
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    first, cache = model(
        torch.cat([references, latents], dim=1),
        timestep=sigma,
        img_ids=torch.cat([reference_ids, image_ids], dim=1),
        kv_cache_mode="extract",
        num_ref_tokens=references.shape[1],
        **given,
    )
    (second,) = model(
        latents.flip(1), timestep=sigma / 2, img_ids=image_ids, kv_cache_mode="cached", kv_cache=cache, **given
    )
    return [plain, beside, first, second]


def transformer_full_size(config):
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel.from_config(config)


# ---- pairs that cannot change the output


def same_sum_in_the_adapter(first: str, second: str) -> bool:
    """The two halves of the adapter are added up, and with them the biases of their last layers."""
    return {first, second} == {"mlp.5.bias", "attn.out.bias"}


_VAE = dict(
    module=AutoencoderKLFlux2,
    reference=vae_reference,
    inputs=vae_inputs,
    ours=run_vae,
    theirs=run_vae_reference,
    gains={"decoder.conv_out.weight": 0.3},
    neutral=(key_biases, same_sum_in_a_resnet),
    full_size=vae_full_size,
    buffers=("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"),
    ignored=("bn.num_batches_tracked",),
)

_QWEN3 = dict(reference=qwen3_reference, inputs=qwen3_inputs, ours=run_qwen3)

COMPONENTS = (
    Component(
        name="text_encoder",
        module=KleinTextEncoder,
        settings={
            "as published": {},
            "its own head, more layers": dict(tie_word_embeddings=False, num_hidden_layers=31, hidden_size=16),
            "27 layers, the last of them normed": dict(num_hidden_layers=27, num_attention_heads=6, rope_theta=100),
        },
        theirs=run_qwen3_reference((9, 18, 27)),
        published={"FLUX.2-klein-4B/text_encoder": 4_022_468_096, "FLUX.2-klein-9B/text_encoder": 8_190_735_360},
        full_size=qwen3_full_size,
        ignored=(*_ABOVE, "model.norm.weight", "lm_head.weight"),
        **_QWEN3,
    ),
    Component(
        name="small text encoder",
        module=SmallQwen3,
        settings={"as published": {}, "one head of keys": dict(num_key_value_heads=1, hidden_size=40)},
        theirs=run_qwen3_reference((2, 9, 14, 18, 23, 27)),
        **_QWEN3,
    ),
    Component(
        name="small text encoder's adapter",
        module=SmallTextAdapter,
        reference=adapter_reference,
        settings={
            "as published": {},
            "other sizes": dict(hidden_states=3, attention_heads=4, attention_blocks=1, mlp_features=40),
        },
        inputs=adapter_inputs,
        ours=run_adapter,
        theirs=run_adapter_reference,
        save=save_adapter,
        swap=dict(hidden_size=2, hidden_states=8, out_features=16, mlp_features=16),
        neutral=(same_sum_in_the_adapter,),
        neutral_pairs=1,
    ),
    Component(
        name="transformer",
        module=Flux2Transformer,
        reference=transformer_reference,
        settings={
            "as published": {},
            "three heads": dict(num_attention_heads=3, num_layers=1, num_single_layers=3, mlp_ratio=2.5),
            "only double blocks": dict(num_single_layers=0, num_layers=3, rope_theta=100, eps=1e-3),
            "only single blocks": dict(
                num_layers=0, out_channels=12, patch_size=2, attention_head_dim=20, axes_dims_rope=[2, 6, 8, 4]
            ),
        },
        inputs=transformer_inputs,
        ours=run_transformer,
        theirs=run_transformer_reference,
        published={"FLUX.2-klein-4B/transformer": 3_875_544_576, "FLUX.2-klein-9B/transformer": 9_078_581_248},
        full_size=transformer_full_size,
        swap=dict(
            in_channels=16,
            attention_head_dim=8,
            axes_dims_rope=[2, 2, 2, 2],
            joint_attention_dim=16,
            timestep_guidance_channels=16,
            num_layers=2,
            num_single_layers=2,
        ),
    ),
    Component(
        name="vae",
        settings={
            "as published": dict(block_out_channels=[8, 8, 16], layers_per_block=2),
            "small decoder": dict(decoder_block_out_channels=[4, 12], batch_norm_eps=1e-2),
            "no quantization convolutions": dict(use_quant_conv=False, use_post_quant_conv=False, latent_channels=3),
        },
        published={"FLUX.2/vae": 84_046_115, "FLUX.2-small-decoder": 62_373_091},
        swap=dict(block_out_channels=[4, 8], norm_num_groups=2),
        neutral_pairs=3,
        **_VAE,
    ),
)


# ---- whole pictures

SCHEDULER = dict(
    base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15, num_train_timesteps=1000,
    shift=3.0, time_shift_type="exponential", use_dynamic_shifting=True,
)  # fmt: skip
PROMPT = "a large red circle on a Café's wall 🐱"
KV = "Flux2KleinKVPipeline"


def write_klein(folder: Path, *, pipeline: str = "Flux2KleinPipeline", heads: int = 2, blocks=(2, 2), **index) -> Path:
    """A tiny model as it is published, by the reference classes."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from support.reference import draw

    vocabulary = len(write_qwen_tokenizer(folder / "tokenizer"))
    text = qwen3_reference(vocab_size=vocabulary, hidden_size=16)
    draw(text, 1).save_pretrained(folder / "text_encoder")
    transformer = transformer_reference(
        in_channels=128, joint_attention_dim=48, num_attention_heads=heads, num_layers=blocks[0],
        num_single_layers=blocks[1], timestep_guidance_channels=256, rope_theta=2000,
    )  # fmt: skip
    draw(transformer, 2).save_pretrained(folder / "transformer")
    vae = vae_reference(block_out_channels=[8, 8, 16, 16], latent_channels=32)
    draw(vae, 3, {"decoder.conv_out.weight": 0.3}).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    content = {
        "_class_name": pipeline,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (folder / "model_index.json").write_text(json.dumps(content | index))
    return folder


def draw_ours(folder: Path, settings):
    from mflux.models.flux2.variants.edit.flux2_klein_edit import Flux2KleinEdit
    from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein

    edits = "image_paths" in settings or "use_kv_cache" in settings
    pipeline = (Flux2KleinEdit if edits else Flux2Klein)(
        model_path=str(folder), model_config=ModelConfig.flux2_klein_4b()
    )
    return generated(pipeline, **settings)


def draw_theirs(folder: Path, settings):
    import PIL.Image
    import torch

    from mflux.models.flux2.latent_creator.flux2_latent_creator import Flux2LatentCreator

    keeps = settings.get("use_kv_cache", KV in (folder / "model_index.json").read_text())
    pipeline = pipeline_reference(folder, KV if keeps else "Flux2KleinPipeline")
    height, width = settings["height"], settings["width"]
    noise = Flux2LatentCreator.create_noise(settings["seed"], height, width)
    latents = torch.tensor(np.array(Flux2LatentCreator.unpack_latents(noise, height, width)))
    steps = settings["num_inference_steps"]
    sigmas = np.linspace(1.0, 1 / steps, steps)
    if source := settings.get("image_path"):
        first = max(1, int(steps * settings["image_strength"]))
        picture = source.resize((width, height), PIL.Image.Resampling.LANCZOS)
        with torch.no_grad():
            clean = pipeline._encode_vae_image(pipeline.image_processor.preprocess(picture), None)
        sigma = shifted(sigmas, height * width // 256, steps)[first]
        latents, sigmas = (1 - sigma) * clean + sigma * latents, sigmas[first:]
    seen = {}

    def after_step(_pipeline, step, timestep, values):
        seen.update(values)
        return values

    guidance = {} if keeps else {"guidance_scale": settings.get("guidance", 1.0)}
    image = pipeline(
        image=settings.get("image_paths"),
        prompt=settings["prompt"],
        height=height,
        width=width,
        num_inference_steps=steps,
        sigmas=sigmas,
        latents=latents.float(),
        callback_on_step_end=after_step,
        **guidance,
    ).images[0]
    return seen["latents"].numpy(), np.asarray(image)


def shifted(sigmas: np.ndarray, tokens: int, steps: int) -> np.ndarray:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    return 1 / (1 + np.exp(-compute_empirical_mu(tokens, steps)) * (1 / sigmas - 1))


def _picture(**settings):
    return dict(seed=3, prompt=PROMPT, num_inference_steps=3, height=48, width=80) | settings


PIPELINES = (
    Pipeline(
        name="pictures",
        folders={
            "distilled": lambda folder: write_klein(folder, is_distilled=True),
            "base": lambda folder: write_klein(folder, is_distilled=False, heads=3, blocks=(1, 3)),
            "keeps its references": lambda folder: write_klein(folder, pipeline=KV),
        },
        pictures={
            "distilled": ("distilled", _picture()),
            "distilled, with guidance that it has no use for": (
                "distilled",
                _picture(guidance=3.0, num_inference_steps=1, height=96, width=32, seed=2**63),
            ),
            "base, no guidance": ("base", _picture(num_inference_steps=5, prompt="")),
            "base, guided": ("base", _picture(guidance=4.0, num_inference_steps=4)),
            "a long prompt, cut": ("base", _picture(prompt="a blue square " * 100, num_inference_steps=2)),
            "from a picture": (
                "distilled",
                _picture(image_path=photo(100, 70), image_strength=0.4, num_inference_steps=5),
            ),
            "from a picture, guided": (
                "base",
                _picture(image_path=photo(64, 64), image_strength=0.75, num_inference_steps=6, guidance=2.0, height=64),
            ),
            "one reference": ("distilled", _picture(image_paths=[photo(70, 90)])),
            "two references, guided": (
                "base",
                _picture(image_paths=[photo(80, 64), photo(133, 71)], guidance=2.5, height=64, width=48),
            ),
            "a reference that is too large": (
                "distilled",
                _picture(image_paths=[photo(3000, 401)], num_inference_steps=1, height=32, width=32),
            ),
            "kept references": ("keeps its references", _picture(image_paths=[photo(64, 96), photo(70, 80)], seed=4)),
            "kept where none are": ("keeps its references", _picture(use_kv_cache=True)),
        },
        ours=draw_ours,
        theirs=draw_theirs,
    ),
)


# ---- a model that needs no reference


def write_tiny(folder: Path, *, wide: bool = False, changes: Mapping[str, Settings] | None = None) -> Path:
    """A whole model of random weights, in the published layout; `changes` are to configurations, by folder."""
    from support.tiny import published, write_components

    width = 64 if wide else 32
    vocabulary = len(write_qwen_tokenizer(folder / "tokenizer"))
    write_json(folder / "model_index.json", {"_class_name": "Flux2KleinPipeline", "is_distilled": True})
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler"} | SCHEDULER
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    parts = {
        "text_encoder": (KleinTextEncoder.saved_class, {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": vocabulary,
            "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 28, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": width,
        }),
        "transformer": (Flux2Transformer, {
            "_class_name": "Flux2Transformer2DModel", "num_layers": 1, "num_single_layers": 2,
            "attention_head_dim": width // 2, "num_attention_heads": 2, "axes_dims_rope": [width // 8] * 4,
            "joint_attention_dim": 3 * width,
        }),
        "vae": (AutoencoderKLFlux2, {
            "_class_name": "AutoencoderKLFlux2", "block_out_channels": [8, 8, 16, width], "norm_num_groups": 4,
            "layers_per_block": 1, "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        }),
    }  # fmt: skip

    def weights(module, *, seed: int) -> dict[str, mx.array]:
        tensors = published(module, seed=seed)
        if isinstance(module, AutoencoderKLFlux2):
            tensors["bn.running_var"] = mx.abs(tensors["bn.running_var"]) + 0.5
            tensors["bn.num_batches_tracked"] = mx.array(7)
        return tensors

    return write_components(folder, parts, changes=changes, draw=weights)


_SOURCE = Path(__file__).parents[3] / "docs" / "demo.png"

TINY = (
    Tiny(
        write=write_tiny,
        command="generate-flux2",
        base_model="flux2-klein-4b",
        pipeline="mflux.models.flux2.variants.txt2img.flux2_klein:Flux2Klein",
        refused=(
            ("transformer", {"_class_name": "FluxTransformer2DModel"}, "not FLUX.2's transformer"),
            ("transformer", {"in_channels": 64}, "a transformer that takes 64;"),
            ("vae", {"latent_channels": 16}, "64 latent channels for every 16 pixels"),
            ("vae", {"patch_size": [2, 1]}, "patch_size"),
            ("vae", {"decoder_block_out_channels": [8, 8]}, "encoder and decoder differ"),
        ),
        refused_later=(
            ("transformer", {"guidance_embeds": True}, "FLUX.2-dev"),
            ("transformer", {"axes_dims_rope": [8, 8]}, "axes_dims_rope"),
            ("text_encoder", {"num_hidden_layers": 26}, "hidden states 9, 18, 27"),
            ("text_encoder", {"model_type": "llama"}, "qwen3"),
        ),
    ),
    Tiny(
        write=write_tiny,
        command="generate-flux2-edit",
        base_model="flux2-klein-4b",
        words=("--image-paths", _SOURCE, _SOURCE),
        pipeline="mflux.models.flux2.variants.edit.flux2_klein_edit:Flux2KleinEdit",
        generate={"image_paths": [_SOURCE, _SOURCE]},
    ),
)


# ---- training


def _encoded(folder: Path, image, prompt: str, width: int, height: int, source):
    import torch

    pipeline = pipeline_reference(folder, "Flux2KleinPipeline")
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt(prompt)
        pixels = pipeline.image_processor.preprocess(image)
        latents = pipeline._pack_latents(pipeline._encode_vae_image(pixels, None))
        cond = {"prompt_embeds": embeds}
        if source is not None:
            pixels = pipeline.image_processor.preprocess(source, *source.size[::-1], resize_mode="crop")
            tokens, ids = pipeline.prepare_image_latents([pixels], 1, None, "cpu", torch.float32)
            cond |= {"image_latents": tokens, "image_latent_ids": ids}
    return latents, cond


def _velocity(transformer, latents, sigma, cond, width: int, height: int, guidance: float):
    import torch
    from diffusers import Flux2KleinPipeline

    ids = Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 1, height // 16, width // 16))
    tokens = latents
    if "image_latents" in cond:
        tokens = torch.cat([latents, cond["image_latents"]], dim=1)
        ids = torch.cat([ids, cond["image_latent_ids"]], dim=1)
    sample = transformer(
        hidden_states=tokens,
        encoder_hidden_states=cond["prompt_embeds"],
        timestep=torch.tensor([sigma]),
        img_ids=ids,
        txt_ids=Flux2KleinPipeline._prepare_text_ids(cond["prompt_embeds"]),
    ).sample
    return sample[:, : latents.shape[1]]


_TRAINING = dict(
    pipeline="Flux2KleinPipeline",
    transformer="Flux2Transformer2DModel",
    targets=(
        {"module_path": "transformer_blocks.{block}.attn.to_q", "blocks": "all", "rank": 4, "alpha": 8},
        # 0.24's name of a layer.
        {"module_path": "transformer_blocks.{block}.attn.to_out", "blocks": {"indices": [0]}, "rank": 2},
        {"module_path": "transformer_blocks.{block}.ff.linear_in", "blocks": "all", "rank": 4},
        {"module_path": "double_stream_modulation_img.linear", "rank": 3, "alpha": 1.5},
        {"module_path": "single_transformer_blocks.{block}.attn.to_qkv_mlp_proj", "blocks": "all", "rank": 4},
        {"module_path": "single_transformer_blocks.1.attn.to_out", "rank": 2, "alpha": 5},
    ),
    encoded=_encoded,
    velocity=_velocity,
)
TRAINING = (
    Training(
        name="training",
        model="flux2-klein-4b",
        write=lambda folder: write_klein(folder, is_distilled=True),
        **_TRAINING,
    ),
    Training(
        name="training to edit",
        model="flux2-klein-base-4b",
        write=lambda folder: write_klein(folder, is_distilled=False, heads=3, blocks=(1, 2)),
        pairs=True,
        **_TRAINING,
    ),
)

"""Anima: what the tests of all families need to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from support.cases import Component, Pipeline, Settings, Tiny
from support.images import generated, noise
from support.tokenizers import write_json, write_qwen_tokenizer, write_t5_tokenizer

from families.flux.cases import normal, token_ids
from families.qwen.cases import vae_reference
from mflux.backend import mx
from mflux.models.anima.latent_creator.anima_latent_creator import AnimaLatentCreator
from mflux.models.anima.model.text_conditioner import AnimaTextConditioner
from mflux.models.anima.model.text_encoder import AnimaTextEncoder
from mflux.models.anima.model.transformer import AnimaTransformer
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.autoencoders.wan import AutoencoderWan

# ---- text encoder

TEXT = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
)  # fmt: skip


def text_reference(**settings):
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**TEXT | settings))


def text_inputs(model, number: int) -> dict:
    return {"ids": token_ids((1, 3)[number], (9, 5)[number], 60)}


def run_text(module, inputs):
    return [module(mx.array(inputs["ids"]))]


def run_text_reference(model, inputs):
    import torch

    return [model(input_ids=torch.tensor(inputs["ids"])).last_hidden_state]


def text_full_size(config):
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**config))


# ---- text conditioner

CONDITIONER = dict(
    source_dim=16, target_dim=24, model_dim=24, num_layers=2, num_attention_heads=3, target_vocab_size=64,
    min_sequence_length=12,
)  # fmt: skip


def conditioner_reference(**settings):
    from diffusers import AnimaTextConditioner as Reference

    return Reference(**CONDITIONER | settings)


def conditioner_inputs(model, number: int) -> dict:
    """Fewer tokens than are given at least, and more."""
    states, words = ((7, 5), (4, 17))[number]
    return {
        "states": normal(1, 1, states, model.config.source_dim),
        "ids": token_ids(1, words, model.config.target_vocab_size),
    }


def run_conditioner(module, inputs):
    return [module(mx.array(inputs["states"]), mx.array(inputs["ids"]))]


def run_conditioner_reference(model, inputs):
    import torch

    # It multiplies with positions in the dtype of what it is given.
    states = torch.tensor(inputs["states"]).to(model.norm.weight.dtype)
    return [model(states, torch.tensor(inputs["ids"]))]


def conditioner_full_size(config):
    from diffusers import AnimaTextConditioner as Reference

    return Reference.from_config(config)


# ---- transformer

TRANSFORMER = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, text_embed_dim=24,
    adaln_lora_dim=8, rope_scale=[1.0, 4.0, 4.0], concat_padding_mask=True, extra_pos_embed_type=None,
)  # fmt: skip


def without_torchvision() -> None:
    """The reference asks it for one thing, of a mask that is all zero."""
    from diffusers.models.transformers import transformer_cosmos

    def resize(mask, size, interpolation):
        assert not mask.any()
        return mask.new_zeros(*mask.shape[:2], *size)

    if not hasattr(transformer_cosmos, "transforms"):
        nearest = SimpleNamespace(NEAREST=None)
        transformer_cosmos.transforms = SimpleNamespace(
            functional=SimpleNamespace(resize=resize), InterpolationMode=nearest
        )


def transformer_reference(**settings):
    from diffusers import CosmosTransformer3DModel

    without_torchvision()
    return CosmosTransformer3DModel(**TRANSFORMER | settings)


def transformer_inputs(model, number: int) -> dict:
    batch, (rows, columns), length = ((1, (6, 10), 7), (3, (12, 4), 11))[number]
    return {
        "latents": normal(1, batch, model.config.in_channels, rows, columns),
        "text": normal(2, batch, length, model.config.text_embed_dim),
        # One noise level for each sample, so that none can stand for all.
        "sigma": np.linspace(0.9, 0.3, batch, dtype=np.float32),
    }


def run_transformer(module, inputs):
    given = {"sigma": mx.array(inputs["sigma"]), "prompt_embeds": mx.array(inputs["text"])}
    return [module(mx.array(inputs["latents"]), **given)]


def run_transformer_reference(model, inputs):
    import torch

    latents = torch.tensor(inputs["latents"])[:, :, None]
    mask = torch.zeros(1, 1, *latents.shape[-2:])
    given = {"timestep": torch.tensor(inputs["sigma"]), "encoder_hidden_states": torch.tensor(inputs["text"])}
    return [model(hidden_states=latents, padding_mask=mask, **given).sample[:, :, 0]]


def transformer_full_size(config):
    from diffusers import CosmosTransformer3DModel

    return CosmosTransformer3DModel.from_config(config)


def norms_of_what_has_no_positions(first: str, second: str) -> bool:
    """Queries and keys that nothing turns are multiplied channel by channel, and their norms' weights with them."""
    return {first.rpartition(".attn2.")[2], second.rpartition(".attn2.")[2]} == {"norm_q.weight", "norm_k.weight"}


COMPONENTS = (
    Component(
        name="text_encoder",
        module=AnimaTextEncoder,
        reference=text_reference,
        settings={"as published": {}, "one head of keys": dict(num_key_value_heads=1, hidden_size=40, rope_theta=100)},
        inputs=text_inputs,
        ours=run_text,
        theirs=run_text_reference,
        published={"Anima/text_encoder (Qwen3-0.6B-Base)": 596_049_920},
        full_size=text_full_size,
        published_name=lambda name: f"model.{name}",
    ),
    Component(
        name="text_conditioner",
        module=AnimaTextConditioner,
        reference=conditioner_reference,
        settings={
            "as published": {},
            "without attention to itself": dict(use_self_attention=False, num_layers=3, mlp_ratio=2.5),
            "another width inside": dict(model_dim=40, num_attention_heads=2),
        },
        inputs=conditioner_inputs,
        ours=run_conditioner,
        theirs=run_conditioner_reference,
        published={"Anima/text_conditioner": 134_663_680},
        full_size=conditioner_full_size,
        swap=dict(source_dim=16, target_dim=16, model_dim=16, num_attention_heads=2, mlp_ratio=1.0, num_layers=1),
    ),
    Component(
        name="transformer",
        module=AnimaTransformer,
        reference=transformer_reference,
        settings={
            "as published": {},
            "three heads": dict(num_attention_heads=3, num_layers=1, attention_head_dim=20, mlp_ratio=2.5),
            "other positions": dict(rope_scale=[2.0, 1.0, 3.0], in_channels=3, out_channels=5, adaln_lora_dim=12),
        },
        inputs=transformer_inputs,
        ours=run_transformer,
        theirs=run_transformer_reference,
        published={"Anima/transformer": 1_956_405_248},
        full_size=transformer_full_size,
        swap=dict(text_embed_dim=32, mlp_ratio=1.0, num_layers=1, adaln_lora_dim=32),
        neutral=(norms_of_what_has_no_positions,),
        neutral_pairs=1,
    ),
)


# ---- whole images

PROMPT = "1girl, solo, red_circle on a Café's wall, 猫 🐱, masterpiece"


def write_anima(folder: Path, *, heads: int = 2, layers: int = 2, **transformer) -> Path:
    """A tiny model in diffusers' layout, by the reference classes."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from support.reference import draw
    from support.tokenizers import write_trained_t5_tokenizer

    vocabulary = len(write_qwen_tokenizer(folder / "tokenizer"))
    pieces = len(write_trained_t5_tokenizer(folder / "t5_tokenizer"))
    draw(text_reference(vocab_size=vocabulary), 1).save_pretrained(folder / "text_encoder")
    conditioner = conditioner_reference(target_vocab_size=pieces, min_sequence_length=40)
    draw(conditioner, 2).save_pretrained(folder / "text_conditioner")
    model = transformer_reference(
        in_channels=16, out_channels=16, num_attention_heads=heads, num_layers=layers, **transformer
    )
    draw(model, 3).save_pretrained(folder / "transformer")
    vae = vae_reference(base_dim=4, dim_mult=[1, 2, 2, 2], temperal_downsample=[False, True, True], z_dim=16)
    draw(vae, 4, {"decoder.conv_out.weight": 0.2}).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    write_json(folder / "modular_model_index.json", {"_class_name": "AnimaModularPipeline"})
    return folder


def draw_ours(folder: Path, settings):
    from mflux.models.anima.variants.txt2img.anima import Anima

    config = ModelConfig.from_name("anima-base")
    return generated(Anima(model_path=str(folder), model_config=config), scheduler="euler", **settings)


@cache
def reference_pipeline(folder: Path):
    from diffusers import (
        AnimaTextConditioner,
        AutoencoderKLQwenImage,
        CosmosTransformer3DModel,
        FlowMatchEulerDiscreteScheduler,
    )
    from diffusers.modular_pipelines.anima.modular_blocks_anima import AnimaAutoBlocks
    from transformers import Qwen2Tokenizer, Qwen3Model, T5TokenizerFast

    without_torchvision()
    pipeline = AnimaAutoBlocks().init_pipeline()
    pipeline.update_components(
        text_encoder=Qwen3Model.from_pretrained(folder / "text_encoder"),
        text_conditioner=AnimaTextConditioner.from_pretrained(folder / "text_conditioner"),
        transformer=CosmosTransformer3DModel.from_pretrained(folder / "transformer"),
        vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae"),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        t5_tokenizer=T5TokenizerFast.from_pretrained(folder / "t5_tokenizer"),
    )
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    # An empty prompt is one token that is attended to, as ComfyUI has it, and the model was trained.
    pipeline.tokenizer = lambda prompts, **options: tokenizer(
        [prompt or tokenizer.pad_token for prompt in prompts], **options
    )
    return pipeline


def draw_theirs(folder: Path, settings):
    pipeline = reference_pipeline(folder)
    pipeline.guider.guidance_scale = settings.get("guidance", 4.0)
    state = pipeline(
        prompt=settings["prompt"],
        negative_prompt=settings.get("negative_prompt", ""),
        height=settings["height"],
        width=settings["width"],
        num_inference_steps=settings["num_inference_steps"],
        latents=noise(AnimaLatentCreator, settings)[:, :, None],
        max_sequence_length=4096,
    )
    return state.get("latents")[:, :, 0].numpy(), np.asarray(state.get("images")[0])


def _image(**settings):
    return dict(seed=3, prompt=PROMPT, num_inference_steps=4, height=48, width=80) | settings


PIPELINES = (
    Pipeline(
        name="images",
        folders={
            "published": write_anima,
            "three heads": lambda folder: write_anima(folder, heads=3, layers=1, mlp_ratio=2.0),
        },
        pictures={
            "guided": ("published", _image()),
            "no guidance": ("published", _image(guidance=1.0, num_inference_steps=1, height=96, width=32)),
            "a negative prompt": ("three heads", _image(negative_prompt="worst quality, blurry", guidance=5.0)),
            "no prompt": ("three heads", _image(prompt="", guidance=1.0, seed=2**63)),
            "less than no guidance": ("published", _image(guidance=0.5, num_inference_steps=2)),
            "a long prompt": ("published", _image(prompt="blue_hair, square, " * 150, num_inference_steps=2)),
        },
        ours=draw_ours,
        theirs=draw_theirs,
    ),
)


# ---- a model that needs no reference


def write_tiny(folder: Path, *, wide: bool = False, changes: Mapping[str, Settings] | None = None) -> Path:
    """A whole model of random weights, in diffusers' layout; `changes` are to configurations, by folder."""
    from support.tiny import write_components

    width = 64 if wide else 32
    vocabulary = len(write_qwen_tokenizer(folder / "tokenizer"))
    pieces = len(write_t5_tokenizer(folder / "t5_tokenizer"))
    write_json(folder / "modular_model_index.json", {"_class_name": "AnimaModularPipeline"})
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": False}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    parts = {
        "text_encoder": (AnimaTextEncoder, {
            "architectures": ["Qwen3Model"], "model_type": "qwen3", "vocab_size": vocabulary, "hidden_size": width,
            "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": width,
        }),
        "text_conditioner": (AnimaTextConditioner, {
            "_class_name": "AnimaTextConditioner", "source_dim": width, "target_dim": width, "model_dim": width,
            "num_layers": 1, "num_attention_heads": 2, "target_vocab_size": pieces, "min_sequence_length": 16,
        }),
        "transformer": (AnimaTransformer, {
            "_class_name": "CosmosTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": width // 2,
            "num_layers": 2, "text_embed_dim": width, "adaln_lora_dim": 16,
        }),
        "vae": (AutoencoderWan, {
            "_class_name": "AutoencoderKLQwenImage", "base_dim": 8, "dim_mult": [1, 2, 2, 2], "z_dim": 16,
        }),
    }  # fmt: skip
    return write_components(folder, parts, changes=changes)


TINY = (
    Tiny(
        write=write_tiny,
        command="generate-anima",
        base_model="anima-turbo",
        pipeline="mflux.models.anima.variants.txt2img.anima:Anima",
        refused=(
            ("transformer", {"_class_name": "FluxTransformer2DModel"}, "not Anima's transformer"),
            ("transformer", {"in_channels": 8}, "a transformer that takes 8;"),
            ("vae", {"dim_mult": [1, 2, 2], "temperal_downsample": [False, True]}, "for every 4 pixels"),
        ),
        refused_later=(
            ("transformer", {"extra_pos_embed_type": "learnable"}, "learned positions"),
            ("transformer", {"concat_padding_mask": False}, "concat_padding_mask"),
            ("text_conditioner", {"use_layer_norm": True}, "use_layer_norm"),
            ("text_encoder", {"model_type": "llama"}, "qwen3"),
        ),
    ),
)

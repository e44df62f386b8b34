"""A FLUX.1 checkpoint of a few hundred kilobytes with random weights, in the published folder layout.

Written with nothing but MLX: every parameter of mflux's own modules is drawn at random (norms and
biases too, so that a tensor that is ignored or swapped shows) and turned to the layout that published files have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mflux.backend import mx, nn, tree_flatten
from mflux.checkpoints.loading import published_turns
from mflux.models.common.networks.autoencoders.kl import AutoencoderKL
from mflux.models.common.networks.text_encoders.clip import CLIPTextEncoder
from mflux.models.common.networks.text_encoders.t5 import T5Encoder
from mflux.models.flux.model.transformer import FluxTransformer
from support.tokenizers import write_clip_tokenizer, write_json, write_t5_tokenizer


def write_checkpoint(
    folder: Path,
    *,
    seed: int,
    guidance: bool,
    dtype: mx.Dtype = mx.float32,
    wide: bool = False,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    draw: Callable[..., dict[str, mx.array]] | None = None,
) -> Path:
    """Write a whole model; the same arguments give the same files.

    Args:
        folder: created; its name tells the base model only if it holds one's name.
        seed: of the weights.
        guidance: whether it is guidance-distilled and shifts by resolution like FLUX.1-dev, or like schnell.
        dtype: how the weights are stored.
        wide: in rows of 64 and its multiples, so that nearly every layer can be quantized.
        changes: to the configurations, by the component's folder.
        draw: makes the weights instead of `published`.
    """
    width, heads = (48, 3) if guidance else (32, 2)
    clip_width, clip_hidden, t5_width, t5_hidden = 16, 24, 24, 32
    if wide:
        width, heads = 64, 4
        clip_width, clip_hidden, t5_width, t5_hidden = 64, 128, 64, 96
    clip_vocabulary = len(write_clip_tokenizer(folder / "tokenizer"))
    t5_vocabulary = len(write_t5_tokenizer(folder / "tokenizer_2"))
    write_json(folder / "model_index.json", {"_class_name": "FluxPipeline"})
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000, "shift": 3.0 if guidance else 1.0, "use_dynamic_shifting": guidance,
            "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096,
        },
    )  # fmt: skip
    parts = {
        "text_encoder": (CLIPTextEncoder, {
            "vocab_size": clip_vocabulary, "hidden_size": clip_width, "intermediate_size": clip_hidden,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 24, "eos_token_id": 2,
        }),
        "text_encoder_2": (T5Encoder, {
            "vocab_size": t5_vocabulary, "d_model": t5_width, "d_kv": 8, "d_ff": t5_hidden,
            "num_layers": 2, "num_heads": 2, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
        }),
        "transformer": (FluxTransformer, {
            "_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1, "in_channels": 64,
            "num_attention_heads": heads, "attention_head_dim": width // heads, "axes_dims_rope": [4, 6, 6],
            "joint_attention_dim": t5_width, "pooled_projection_dim": clip_width, "guidance_embeds": guidance,
        }),
        "vae": (AutoencoderKL, {
            "block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 16,
            "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        }),
    }  # fmt: skip
    return write_components(
        folder, parts, changes=changes, seed=10 * seed, draw=partial(draw or published, dtype=dtype)
    )


def write_components(
    folder: Path,
    parts: Mapping[str, tuple[type, dict[str, Any]]],
    *,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    draw: Callable[..., dict[str, mx.array]] | None = None,
) -> Path:
    """Write configurations and weights, by the component's folder; returns what they were written into.

    Args:
        parts: each component's class and configuration.
        changes: to the configurations.
        seed: of the first component's weights; the others count on from it.
        draw: makes the weights instead of `published`.
    """
    for number, (name, (module_class, config)) in enumerate(parts.items(), seed):
        config = config | (changes or {}).get(name, {})
        write_json(folder / name / "config.json", config)
        tensors = (draw or published)(module_class(module_class.config_class.from_dict(config)), seed=number)
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        mx.save_safetensors(str(folder / name / f"{stem}.safetensors"), tensors, metadata={"format": "pt"})
    return folder


def published(module: nn.Module, *, seed: int, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    """Random tensors for all parameters of a module, as a published file holds them."""
    key = mx.random.key(seed)
    kernels = published_turns(module)
    tensors = {}
    for name, parameter in tree_flatten(module.parameters()):
        key, draw = mx.random.split(key)
        value = mx.random.normal(parameter.shape, key=draw)
        if parameter.ndim == 1:
            value = 1 + 0.3 * value if "norm" in name and name.endswith("weight") else 0.1 * value
        else:
            # Variance-preserving, so that the picture neither fades nor saturates.
            value = value * (parameter.size / parameter.shape[0]) ** -0.5
        if name in kernels:
            # The inverse of what loading does to a kernel.
            value = kernels[name](value)
        tensors[name] = mx.contiguous(value.astype(dtype))
    mx.eval(tensors)
    return tensors

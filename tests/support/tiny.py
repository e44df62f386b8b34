"""A FLUX.1 checkpoint of a few hundred kilobytes with random weights, in the published folder layout.

Written with nothing but MLX and tokenizers: every parameter of mflux's own modules is drawn at random (norms and
biases too, so that a tensor that is ignored or swapped shows) and turned to the layout that published files have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from mflux.backend import mx, nn, tree_flatten
from mflux.checkpoints.loading import published_turns
from mflux.models.common.networks.autoencoders.kl import AutoencoderKL
from mflux.models.common.networks.text_encoders.clip import CLIPTextEncoder
from mflux.models.common.networks.text_encoders.t5 import T5Encoder
from mflux.models.flux.model.transformer import FluxTransformer

WORDS = ("a", "red", "blue", "green", "circle", "square", "on", "white", "black", "background", "large", "small")


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
    clip_vocabulary = write_clip_tokenizer(folder / "tokenizer")
    t5_vocabulary = write_t5_tokenizer(folder / "tokenizer_2")
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
        "text_encoder": (CLIPTextEncoder, "model", {
            "vocab_size": clip_vocabulary, "hidden_size": clip_width, "intermediate_size": clip_hidden,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 24, "eos_token_id": 2,
        }),
        "text_encoder_2": (T5Encoder, "model", {
            "vocab_size": t5_vocabulary, "d_model": t5_width, "d_kv": 8, "d_ff": t5_hidden,
            "num_layers": 2, "num_heads": 2, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
        }),
        "transformer": (FluxTransformer, "diffusion_pytorch_model", {
            "_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1, "in_channels": 64,
            "num_attention_heads": heads, "attention_head_dim": width // heads, "axes_dims_rope": [4, 6, 6],
            "joint_attention_dim": t5_width, "pooled_projection_dim": clip_width, "guidance_embeds": guidance,
        }),
        "vae": (AutoencoderKL, "diffusion_pytorch_model", {
            "block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 16,
            "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        }),
    }  # fmt: skip
    for number, (name, (module_class, file, config)) in enumerate(parts.items()):
        config |= (changes or {}).get(name, {})
        write_json(folder / name / "config.json", config)
        module = module_class(module_class.config_class.from_dict(config))
        tensors = (draw or published)(module, seed=10 * seed + number, dtype=dtype)
        mx.save_safetensors(str(folder / name / f"{file}.safetensors"), tensors, metadata={"format": "pt"})
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


def write_clip_tokenizer(folder: Path) -> int:
    """Bytes, bytes that end a word, and the merges that make `WORDS`; returns how many tokens there are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = pieces[0], pieces[1]
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            pieces[:2] = ["".join(pair)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    tokens = list(dict.fromkeys(tokens))
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"model_max_length": 24, "pad_token": "<|endoftext|>"})
    return len(tokens)


def write_t5_tokenizer(folder: Path) -> int:
    """A unigram model of `WORDS` and single letters; returns how many tokens there are."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -3.0 - number / 10) for number, word in enumerate(WORDS)]
    pieces += [(letter, -8.0 - number / 10) for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return len(pieces)


# One user's turn of Qwen3's template, with and without thinking; `chat` is compared with the whole of it in
# tests/parity/test_qwen_tokenizer.py.
_QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)


def write_qwen_tokenizer(folder: Path) -> int:
    """Bytes and the merges that make `WORDS`, as Qwen's repositories have them; returns how many tokens there are."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for word in WORDS:
        for start in range(2, len(word) + 1):
            pair = word[: start - 1], word[start - 1]
            if pair not in merges:
                merges.append(pair)
                tokens.append(word[:start])
    added = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {
        "added_tokens_decoder": {
            str(len(tokens) + number): {"content": token, "special": token.startswith("<|"), **flags}
            for number, token in enumerate(added)
        },
        "chat_template": _QWEN_TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", settings)
    return len(tokens) + len(added)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")

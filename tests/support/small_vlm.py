"""A small FIBO-VLM that knows a few conversations by heart. No torch is needed to make it.

Network and tokenizer are random but for the head, which is solved for: after each token of each conversation the
right next one is the likeliest. What the head stands on comes from the whole network, so an answer comes out only if
the picture, its place and every word were taken in as they were when the head was made.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_flatten
from PIL import Image
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from mflux.backend import mx
from mflux.checkpoints.loading import fill
from mflux.models.common.networks.qwen3_vl import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from mflux.models.fibo.vlm.processor import FiboVLMProcessor
from support.tokenizers import QWEN_VL_SPECIAL, write_whole_tokenizer

WIDTH = 256


@dataclass(frozen=True)
class Conversation:
    """Turns, and what the model is to say; `end` is what it says then."""

    messages: Sequence[dict[str, Any]]
    answer: str
    end: str = "<|im_end|>"


def picture(*colour: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A plain picture with a grey corner."""
    image = Image.new("RGB", size, colour)
    image.paste((128, 128, 128), (0, 0, size[0] // 4, size[1] // 4))
    return image


def write_tokenizer(folder: Path, corpus: Sequence[str], **config: Any) -> Tokenizer:
    """A byte-level tokenizer in the layout of Qwen's."""
    settings = {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "add_prefix_space": False, "clean_up_tokenization_spaces": False, "bos_token": None, "unk_token": None,
    }  # fmt: skip
    return write_whole_tokenizer(folder, corpus, size=400, special=QWEN_VL_SPECIAL, **settings | config)


def configuration(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "tie_word_embeddings": False,
        "text_config": {
            "vocab_size": tokenizer.get_vocab_size(), "hidden_size": WIDTH, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
        },
        "vision_config": {
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": WIDTH,
            "num_position_embeddings": 25, "deepstack_visual_indexes": [0],
        },
    }  # fmt: skip


def random_tensors(network: Qwen3VLForConditionalGeneration, seed: int) -> dict[str, np.ndarray]:
    """For every parameter, laid out as published files are."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, value in tree_flatten(network.parameters()):
        shape = value.shape
        if name.endswith("patch_embed.proj.weight"):
            shape = (shape[0], shape[-1], *shape[1:-1])
        tensor = random.standard_normal(shape).astype(np.float32)
        if "norm" in name:
            tensor = (0 if name.endswith("bias") else 1) + 0.3 * tensor
        elif len(shape) > 1 and "embed" not in name.split(".")[-2]:
            tensor /= np.sqrt(np.prod(shape[1:]))
        tensors[name] = tensor
    # Every token may look far back, and the answers differ with what it finds there.
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] *= 3
    return tensors


def write_model(folder: Path, conversations: Sequence[Conversation], *, seed: int = 1, **config: Any) -> Path:
    """A complete folder in the published layout; `config` goes into the tokenizer's."""
    folder.mkdir(parents=True)
    texts = [conversation.answer for conversation in conversations] + ["<inspire> <refine> <generate> Input: Editing"]
    tokenizer = write_tokenizer(folder, texts, **config)
    values = configuration(tokenizer)
    (folder / "config.json").write_text(json.dumps(values))
    ends = [tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))

    config = Qwen3VLConfig.from_dict(values)
    network = Qwen3VLForConditionalGeneration(config)
    tensors = random_tensors(network, seed)
    fill(network, {name: mx.array(value) for name, value in tensors.items()}, source=folder)
    processor = FiboVLMProcessor.from_folder(folder, config)
    seen, wanted = [], []
    for conversation in conversations:
        inputs = processor(conversation.messages)
        said = tokenizer.encode(conversation.answer + conversation.end, add_special_tokens=False).ids
        prompt = network.prompt([*inputs.ids, *said[:-1]], inputs.patches, inputs.grids)
        hidden = network.model.language_model(prompt.embeddings, prompt.positions, deepstack=prompt.deepstack)
        seen.append(np.array(hidden[0, len(inputs.ids) - 1 :], np.float64))
        wanted += said
    states = np.concatenate(seen)
    assert len(states) == len(wanted) <= WIDTH, f"{len(states)} tokens are too many to learn by heart"
    targets = 50 * np.eye(tokenizer.get_vocab_size())[wanted]
    head = np.linalg.lstsq(states, targets, rcond=None)[0]
    assert np.abs(states @ head - targets).max() < 1, "the states are too alike to be told apart"
    tensors["lm_head.weight"] = np.ascontiguousarray(head.T, dtype=np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

"""Where FLUX.1's components are read from: a folder in the published layout, or one that mflux 0.24 or earlier saved.

The latter has no configuration, tensor names of its own, numbered files, and kernels as MLX lays them out. The names
are translated by the table below; the configurations follow from the shapes, and where no shape tells, they are the
published ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.folders import read_json
from mflux.checkpoints.loading import FolderTensors
from mflux.checkpoints.quantization import Quantization, inferred
from mflux.errors import CheckpointError

# Theirs → ours, as patterns applied in order; a name that none fits is the published one already.
_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "transformer": ((r"\.linear1\.", ".net.0.proj."), (r"\.linear2\.", ".net.2.")),
    "text_encoder": (),
    "text_encoder_2": (
        (r"^final_layer_norm\.", "encoder.final_layer_norm."),
        (r"^t5_blocks\.(\d+)\.attention\.", r"encoder.block.\1.layer.0."),
        (r"^t5_blocks\.(\d+)\.ff\.", r"encoder.block.\1.layer.1."),
    ),
    "vae": ((r"\.(conv_in|conv_out)\.conv2d\.", r".\1."), (r"\.conv_norm_out\.norm\.", ".conv_norm_out.")),
}
# The first block's bias on distances was saved with every block.
_REPEATED = re.compile(r"^t5_blocks\.(?!0\.)\d+\.attention\.SelfAttention\.relative_attention_bias\.")

_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "base_image_seq_len": 256,
    "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15,
}  # fmt: skip
_MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


class PublishedFolder:
    """A model in the diffusers layout: a configuration beside each component's weights."""

    def __init__(self, root: Path):
        self.root = root

    def config(self, part: str) -> dict[str, Any]:
        """What the `config.json` of a component says."""
        return read_json(self.root / part / "config.json")

    def tensors(self, part: str) -> Mapping[str, mx.array]:
        """A component's tensors, by their published names and in the published layout."""
        return FolderTensors(self.root / part)

    def lacking(self) -> dict[str, dict[str, Any]]:
        """The settings that a published model has and this folder does not, by their paths."""
        return {}

    def scheduler(self) -> dict[str, Any]:
        """What `scheduler_config.json` says."""
        return read_json(self.root / "scheduler" / "scheduler_config.json")

    def stored(self, part: str) -> Quantization | None:
        """What a component is quantized to, if at all."""
        return Quantization.stored(self.config(part), self.root / part / "config.json")


class FolderOf024(PublishedFolder):
    """A model that mflux 0.24 or earlier saved, as if it were published."""

    def config(self, part: str) -> dict[str, Any]:
        tensors = Tensors024(self.root / part, part)
        try:
            return _CONFIGS[part](tensors)
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{self.root / part} holds no {part} of FLUX.1 as mflux 0.24 saves it ({error} is missing or makes no "
                "sense): fetch it again, or take a model in the diffusers layout"
            ) from None

    def tensors(self, part: str) -> Mapping[str, mx.array]:
        return Tensors024(self.root / part, part)

    def lacking(self) -> dict[str, dict[str, Any]]:
        return {"model_index.json": _MODEL_INDEX, "scheduler/scheduler_config.json": self.scheduler()}

    def scheduler(self) -> dict[str, Any]:
        guidance = self.config("transformer")["guidance_embeds"]
        # As published with FLUX.1-dev, which takes guidance, and with schnell.
        return _SCHEDULER | {"shift": 3.0 if guidance else 1.0, "use_dynamic_shifting": guidance}

    def stored(self, part: str) -> Quantization | None:
        return Tensors024(self.root / part, part).quantization


def open_folder(root: Path) -> PublishedFolder:
    """A model's folder, of whichever layout it is.

    Raises:
        CheckpointError: it is of neither.
    """
    part = root / "transformer"
    old = not (part / "config.json").is_file() and (
        (part / "model.safetensors.index.json").is_file() or (part / "0.safetensors").is_file()
    )
    return FolderOf024(root) if old else PublishedFolder(root)


class Tensors024(Mapping[str, mx.array]):
    """Tensors with mflux 0.24's names and layout as a mapping with the published ones, read when they are asked for."""

    def __init__(self, folder: Path, part: str):
        # Early versions wrote no index; their files are numbered.
        numbered = sorted(
            (path for path in folder.glob("*.safetensors") if path.stem.isdecimal()), key=lambda path: int(path.stem)
        )
        has_index = (folder / "model.safetensors.index.json").is_file()
        self._tensors = FolderTensors(folder, None if has_index or not numbered else numbered)
        self._theirs = {_translated(name, part): name for name in self._tensors if not _REPEATED.match(name)}

    def __getitem__(self, name: str) -> mx.array:
        value = self._tensors[self._theirs[name]]
        # Only the autoencoder's kernels have four axes.
        return mx.moveaxis(value, -1, 1) if value.ndim == 4 else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._theirs)

    def __len__(self) -> int:
        return len(self._theirs)

    @property
    def quantization(self) -> Quantization | None:
        """What the layers are quantized to, as far as the shape of a square one tells."""
        for weight, rows in _SQUARE:
            if f"{weight}.scales" in self and f"{weight}.weight" in self and rows in self:
                width = self[rows].shape[0]
                return inferred(width, self[f"{weight}.weight"].shape, self[f"{weight}.scales"].shape)
        return None

    def rows(self, name: str) -> int:
        return self[name].shape[0]

    def width(self, layer: str) -> int:
        """How many weights a row of a layer has, quantized or not."""
        columns = self[f"{layer}.weight"].shape[-1]
        return columns * 32 // self.quantization.bits if f"{layer}.scales" in self else columns

    def count(self, pattern: str) -> int:
        """How many numbers occur where `pattern` has a group."""
        return len({match[1] for name in self if (match := re.match(pattern, name))})


# Layers whose input is as wide as a vector, which is never quantized: from these the bits follow.
_SQUARE = (
    ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q.bias"),
    ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj.bias"),
    ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.0.layer_norm.weight"),
    ("decoder.mid_block.attentions.0.to_q", "decoder.mid_block.attentions.0.to_q.bias"),
)


@cache
def _translated(name: str, part: str) -> str:
    for pattern, replacement in _NAMES[part]:
        name = re.sub(pattern, replacement, name)
    return name


def _transformer(tensors: Tensors024) -> dict[str, Any]:
    head = tensors.rows("transformer_blocks.0.attn.norm_q.weight")
    channels = tensors.width("x_embedder")
    out = tensors.rows("proj_out.bias")
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "num_layers": tensors.count(r"transformer_blocks\.(\d+)\."),
        "num_single_layers": tensors.count(r"single_transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": tensors.rows("x_embedder.bias") // head,
        "joint_attention_dim": tensors.width("context_embedder"),
        "pooled_projection_dim": tensors.width("time_text_embed.text_embedder.linear_1"),
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in tensors,
        # No shape tells how a head is shared out; in the published proportion.
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
    }


def _clip(tensors: Tensors024) -> dict[str, Any]:
    width = tensors.rows("text_model.final_layer_norm.weight")
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": tensors.rows("text_model.embeddings.token_embedding.weight"),
        "hidden_size": width,
        "intermediate_size": tensors.rows("text_model.encoder.layers.0.mlp.fc1.bias"),
        "num_hidden_layers": tensors.count(r"text_model\.encoder\.layers\.(\d+)\."),
        # CLIP's heads are 64 wide in all its sizes.
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": tensors.rows("text_model.embeddings.position_embedding.weight"),
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 2,
    }


def _t5(tensors: Tensors024) -> dict[str, Any]:
    attention = "encoder.block.0.layer.0.SelfAttention"
    heads = tensors.width(f"{attention}.relative_attention_bias")
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": tensors.rows("shared.weight"),
        "d_model": tensors.rows("encoder.final_layer_norm.weight"),
        "d_kv": tensors.rows(f"{attention}.q.weight") // heads,
        "d_ff": tensors.rows("encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
        "num_layers": tensors.count(r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": tensors.rows(f"{attention}.relative_attention_bias.weight"),
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
    }


def _vae(tensors: Tensors024) -> dict[str, Any]:
    levels = tensors.count(r"encoder\.down_blocks\.(\d+)\.")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors.rows("decoder.conv_out.bias"),
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [
            tensors.rows(f"encoder.down_blocks.{level}.resnets.0.conv1.bias") for level in range(levels)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": tensors.count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "norm_num_groups": 32,
        "act_fn": "silu",
        "mid_block_add_attention": True,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    }


_CONFIGS = {"transformer": _transformer, "text_encoder": _clip, "text_encoder_2": _t5, "vae": _vae}

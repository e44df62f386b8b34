"""Z-Image in other layouts than the published one: folders that mflux 0.24 saved, and single files of the transformer.

A single file (ComfyUI's, and the authors' own) has the names that the model had before diffusers took it over, queries,
keys and values in one matrix, and no configuration. It may stand in a model's `transformer` folder in place of the
published files. Configurations follow from the shapes; where no shape tells, they are the published ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.folders import read_json
from mflux.checkpoints.loading import FolderTensors
from mflux.checkpoints.published import PublishedFolder
from mflux.checkpoints.saved_by_024 import FolderOf024, Layout024, PlainTensors, Renames, Shapes
from mflux.errors import CheckpointError
from mflux.models.common.networks.autoencoders import kl_024
from mflux.models.common.saved_model import recorded_base_model

# Of Z-Image-Turbo and of Z-Image.
TURBO_SHIFT, BASE_SHIFT = 3.0, 6.0

_MODEL_INDEX = {
    "_class_name": "ZImagePipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def static_schedule(shift: float) -> dict[str, Any]:
    """What `scheduler_config.json` says of a shift that does not depend on the picture's size."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift,
        "use_dynamic_shifting": False,
    }  # fmt: skip


# ---- saved by mflux 0.24

_NAMES: dict[str, Renames] = {
    "transformer": (
        (r"^t_embedder\.linear1\.", "t_embedder.mlp.0."),
        (r"^t_embedder\.linear2\.", "t_embedder.mlp.2."),
        (r"^(all_final_layer\.[^.]+\.adaLN_modulation)\.0\.", r"\1.1."),
    ),
    "text_encoder": ((r"^(?!model\.)", "model."),),
    "vae": (*kl_024.NAMES, (r"\.(conv_in|conv_out)\.conv\.", r".\1.")),
    "controlnet": (),
}
_SQUARE = (
    ("layers.0.attention.to_q", "layers.0.attention_norm1.weight"),
    ("model.layers.0.self_attn.q_proj", "model.layers.0.input_layernorm.weight"),
    ("control_layers.0.attention.to_q", "control_layers.0.attention_norm1.weight"),
    *kl_024.SQUARE,
)


def _patch(tensors: Shapes, embedder: str) -> int:
    names = [match for name in tensors if (match := re.match(rf"{embedder}\.(\d+)-1\.weight", name))]
    return int(names[0][1])


def _transformer(tensors: Shapes) -> dict[str, Any]:
    head, patch = tensors.rows("layers.0.attention.norm_q.weight"), _patch(tensors, "all_x_embedder")
    return {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": [patch],
        "all_f_patch_size": [1],
        "in_channels": tensors.width(f"all_x_embedder.{patch}-1") // patch**2,
        "dim": (dim := tensors.rows("layers.0.attention_norm1.weight")),
        "n_layers": tensors.count(r"layers\.(\d+)\."),
        "n_refiner_layers": tensors.count(r"noise_refiner\.(\d+)\."),
        "n_heads": dim // head,
        "n_kv_heads": dim // head,
        "cap_feat_dim": tensors.rows("cap_embedder.0.weight"),
        # No shape tells how a head is shared out; in the published proportion.
        "axes_dims": [head // 4, head * 3 // 8, head * 3 // 8],
        "axes_lens": [1536, 512, 512],
        "norm_eps": 1e-5, "qk_norm": True, "rope_theta": 256.0, "t_scale": 1000.0,
    }  # fmt: skip


def _text_encoder(tensors: Shapes) -> dict[str, Any]:
    head = tensors.rows("model.layers.0.self_attn.q_norm.weight")
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": tensors.rows("model.embed_tokens.weight"),
        "hidden_size": tensors.rows("model.layers.0.input_layernorm.weight"),
        "intermediate_size": tensors.rows("model.layers.0.mlp.gate_proj.weight"),
        "num_hidden_layers": tensors.count(r"model\.layers\.(\d+)\."),
        "num_attention_heads": tensors.rows("model.layers.0.self_attn.q_proj.weight") // head,
        "num_key_value_heads": tensors.rows("model.layers.0.self_attn.k_proj.weight") // head,
        "head_dim": head,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": True,
    }  # fmt: skip


def controlnet_config(tensors: Shapes) -> dict[str, Any]:
    """The values of a Union ControlNet, which is published without any.

    Which layers get hints follows from how many there are; 2.0 has 2.1's names, and differs in a projection that
    nobody trained.
    """
    head, patch = tensors.rows("control_layers.0.attention.norm_q.weight"), _patch(tensors, "control_all_x_embedder")
    blocks = tensors.count(r"control_layers\.(\d+)\.")
    places = {
        6: range(0, 30, 5), 15: range(0, 30, 2), 3: range(0, 30, 14),
    }.get(blocks)  # fmt: skip
    if places is None:
        raise CheckpointError(
            f"a ControlNet of Z-Image has 15, 6 or (the lite one) 3 layers, and this one has {blocks}: put a "
            "config.json with its control_layers_places beside it"
        )
    refiner = "control_noise_refiner"
    if blocks == 6:
        refiner = None
    elif blocks == 15:
        before = f"{refiner}.0.before_proj.weight"
        if before not in tensors or not mx.any(tensors[before]).item():
            refiner = "control_layers"
    dim = tensors.rows("control_layers.0.attention_norm1.weight")
    return {
        "_class_name": "ZImageControlNetModel",
        "control_layers_places": list(places),
        "control_refiner_layers_places": [0, 1],
        "control_in_dim": tensors.width(f"control_all_x_embedder.{patch}-1") // patch**2,
        "add_control_noise_refiner": refiner,
        "all_patch_size": [patch],
        "all_f_patch_size": [1],
        "dim": dim,
        "n_refiner_layers": 2,
        "n_heads": dim // head,
        "n_kv_heads": dim // head,
        "norm_eps": 1e-5, "qk_norm": True,
    }  # fmt: skip


LAYOUT = Layout024(
    title="Z-Image",
    names=_NAMES,
    configs={
        "transformer": _transformer,
        "text_encoder": _text_encoder,
        "vae": kl_024.config,
        "controlnet": controlnet_config,
    },
    scheduler=lambda _: static_schedule(TURBO_SHIFT),
    model_index=_MODEL_INDEX,
    square=_SQUARE,
)


class ZImageFolderOf024(FolderOf024):
    """Nothing in the tensors tells Z-Image from Turbo: who opens the folder may, else `mflux_model.json` does."""

    shift: float | None = None

    def scheduler(self) -> dict[str, Any]:
        base = recorded_base_model(str(self.root)) == "z-image"
        return static_schedule(self.shift or (BASE_SHIFT if base else TURBO_SHIFT))


# ---- single files

# Patterns and what they become, applied in order, as for mflux 0.24's names.
_ORIGINAL: Renames = (
    (r"^(model\.)?diffusion_model\.", ""),
    (r"^x_embedder\.", "all_x_embedder.2-1."),
    (r"^final_layer\.", "all_final_layer.2-1."),
    (r"\.attention\.([qk])_norm\.", r".attention.norm_\1."),
    (r"\.attention\.out\.", ".attention.to_out.0."),
)
_FUSED = re.compile(r"(.+\.attention)\.qkv\.(weight|scales|biases)")
_UNUSED = "norm_final.weight"


class OriginalTensors(Shapes):
    """The transformer under its original names as a mapping with the published ones, read when they are asked for."""

    def __init__(self, tensors: Mapping[str, mx.array]):
        self._tensors = tensors
        # Published name → the name in the file, and which third of it.
        self._theirs: dict[str, tuple[str, int | None]] = {}
        for name in tensors:
            ours = name
            for pattern, replacement in _ORIGINAL:
                ours = re.sub(pattern, replacement, ours)
            if fused := _FUSED.fullmatch(ours):
                for third, part in enumerate("qkv"):
                    self._theirs[f"{fused[1]}.to_{part}.{fused[2]}"] = name, third
            elif ours != _UNUSED:
                self._theirs[ours] = name, None

    @staticmethod
    def fits(names: Mapping[str, Any]) -> bool:
        return any(re.fullmatch(r"((model\.)?diffusion_model\.)?x_embedder\.weight", name) for name in names)

    def __getitem__(self, name: str) -> mx.array:
        theirs, third = self._theirs[name]
        value = self._tensors[theirs]
        if third is None:
            return value
        rows = value.shape[0] // 3
        return value[third * rows : (third + 1) * rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._theirs)

    def __len__(self) -> int:
        return len(self._theirs)


class ZImageFolder(PublishedFolder):
    """The published layout, in which single files may stand for the transformer and the ControlNet.

    Args:
        root: the model's folder.
        files: component → the one file that holds it, where that lies elsewhere.
    """

    def __init__(self, root: Path, files: Mapping[str, Path] | None = None):
        super().__init__(root)
        self.files = dict(files or {})

    def has(self, part: str) -> bool:
        return part in self.files or super().has(part)

    def config(self, part: str) -> dict[str, Any]:
        path = self.root / part / "config.json"
        if part not in self.files and (path.is_file() or part not in _BY_SHAPE):
            return read_json(path)
        try:
            return _BY_SHAPE[part](self.tensors(part))
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{self.files.get(part, path.parent)} holds no {part} of Z-Image ({error} is missing or makes no "
                "sense), and there is no config.json beside it: take another file"
            ) from None

    def tensors(self, part: str) -> Shapes:
        files = [self.files[part]] if part in self.files else None
        found = FolderTensors(self.root / part, files)
        return OriginalTensors(found) if OriginalTensors.fits(found) else PlainTensors(found)


_BY_SHAPE = {"transformer": _transformer, "controlnet": controlnet_config}


def open_folder(root: Path) -> PublishedFolder:
    """A model's folder, of whichever layout it is."""
    return ZImageFolder(root) if LAYOUT.open(root) is None else ZImageFolderOf024(root, LAYOUT)

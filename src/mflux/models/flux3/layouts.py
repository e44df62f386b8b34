"""FLUX.3 image klein in other layouts than the published one: folders that mflux 0.24 saved, and single files.

The configurations follow from the shapes, and where no shape tells, they are the published ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mflux.checkpoints.published import Layout
from mflux.checkpoints.renamed import Names, Place, Renamed, Table, by_patterns
from mflux.models.common.networks.autoencoders import flux2_024, kl_024
from mflux.models.common.networks.text_encoders import qwen3_024
from mflux.models.flux3.lora_names import BLACK_FOREST_LABS, BLOCKS, SWAPPED

_LANGUAGE = "model.language_model"
_NAMES: dict[str, Names] = {
    "transformer": by_patterns((r"(\.attn\.to_out)\.(?!0\.)", r"\1.0.")),
    "text_encoder": by_patterns((r"^(model\.)?", f"{_LANGUAGE}.")),
    "vae": by_patterns(*flux2_024.NAMES),
}
_SQUARE = (
    # Its own rows are as many as its columns.
    ("single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q.weight"),
    (f"{_LANGUAGE}.layers.0.self_attn.k_proj", f"{_LANGUAGE}.layers.0.input_layernorm.weight"),
    *kl_024.SQUARE,
)


def _transformer(tensors: Renamed) -> dict[str, Any]:
    head = tensors.rows("single_transformer_blocks.0.attn.norm_q.weight")
    width = tensors.rows("x_embedders.image.weight")
    return {
        "_class_name": "Flux3Transformer2DModel",
        "in_channels": tensors.width("x_embedders.image"),
        "cond_in_channels": tensors.width("x_embedders.image_cond"),
        "num_layers": tensors.count(r"txt_mode_blocks\.(\d+)\."),
        "num_single_layers": tensors.count(r"single_transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": tensors.width("context_embedder"),
        "timestep_channels": tensors.width("timestep_embedder.linear_1"),
        "mlp_ratio": tensors.rows("single_transformer_blocks.0.ff.linear_in.weight") / (2 * width),
        # No shape tells how a head is shared out; in equal parts, as published.
        "axes_dims_rope": [head // 4] * 4,
        "rope_theta": 10000,
        "eps": 1e-6,
        "flow_map": "target_timestep_embedder.linear_1.weight" in tensors,
    }


def _text_encoder(tensors: Renamed) -> dict[str, Any]:
    shape = qwen3_024.shape(tensors, _LANGUAGE) | {
        "model_type": "qwen3_vl_text",
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": True,
    }
    del shape["architectures"]
    # How a head's frequencies are shared out no shape tells; as published.
    sections = [share * shape["head_dim"] // 128 for share in (24, 20, 20)]
    shape["rope_scaling"] = {
        "mrope_interleaved": True, "mrope_section": sections, "rope_type": "default", "rope_theta": 5_000_000,
    }  # fmt: skip
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": shape,
    }


_NORMS = {
    f"{theirs}.norm.{name}_norm": (f"{ours}.attn.norm_{name[0]}",)
    for theirs, ours in BLOCKS.items()
    for name in ("query", "key")
}
_TABLE = Table(BLACK_FOREST_LABS | _NORMS, swapped=SWAPPED, leaves={"scale": "weight"})


def _single_file(names: Iterable[str]) -> dict[str, Place] | None:
    """As Black Forest Labs' repositories hold the transformer beside the folders, and ComfyUI; some keep what only
    training needs."""
    return _TABLE(name for name in names if "repa_projectors." not in name)


def _models(transformer: Mapping[str, Any]) -> tuple[str, ...]:
    return ("flux3-image-klein",) if transformer.get("flow_map", True) else ("flux3-image-klein-base",)


LAYOUT = Layout(
    title="FLUX.3",
    files={"transformer": _single_file, "vae": flux2_024.SINGLE_FILE},
    inside={"vae": ("vae.", "first_stage_model.")},
    changes={"vae": kl_024.as_matrix},
    models=_models,
    names=_NAMES,
    configs={"transformer": _transformer, "text_encoder": _text_encoder, "vae": flux2_024.config},
    has_schedule=False,
    square=_SQUARE,
)

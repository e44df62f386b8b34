"""Z-Image in other layouts than the published one: folders that mflux 0.24 saved, and single files of the transformer.

A single file (ComfyUI's, and the authors' own) has the names that the model had before diffusers took it over, queries,
keys and values in one matrix, and no configuration. It may stand in a model's `transformer` folder in place of the
published files. Configurations follow from the shapes; where no shape tells, they are the published ones.
"""

from __future__ import annotations

import re
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.published import Layout, PublishedFolder
from mflux.checkpoints.renamed import Names, Renamed, Table, as_published, by_patterns
from mflux.errors import CheckpointError
from mflux.models.common.networks.autoencoders import kl_024
from mflux.models.common.networks.text_encoders import qwen3_024
from mflux.models.common.saved_model import recorded_base_model
from mflux.models.z_image.lora_names import FUSED, NORMS, ORIGINAL

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


_NAMES: dict[str, Names] = {
    "transformer": by_patterns(
        (r"^t_embedder\.linear1\.", "t_embedder.mlp.0."),
        (r"^t_embedder\.linear2\.", "t_embedder.mlp.2."),
        (r"^(all_final_layer\.[^.]+\.adaLN_modulation)\.0\.", r"\1.1."),
    ),
    "text_encoder": by_patterns((r"^(?!model\.)", "model.")),
    "vae": by_patterns(*kl_024.NAMES, (r"\.(conv_in|conv_out)\.conv\.", r".\1.")),
}
_SQUARE = (
    ("layers.0.attention.to_q", "layers.0.attention_norm1.weight"),
    ("model.layers.0.self_attn.q_proj", "model.layers.0.input_layernorm.weight"),
    ("control_layers.0.attention.to_q", "control_layers.0.attention_norm1.weight"),
    *kl_024.SQUARE,
)


def _patch(tensors: Renamed, embedder: str) -> int:
    names = [match for name in tensors if (match := re.match(rf"{embedder}\.(\d+)-1\.weight", name))]
    return int(names[0][1])


def _transformer(tensors: Renamed) -> dict[str, Any]:
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


def _text_encoder(tensors: Renamed) -> dict[str, Any]:
    return qwen3_024.shape(tensors) | {"rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": True}


def controlnet_config(tensors: Renamed) -> dict[str, Any]:
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
    refiner: str | None = "control_noise_refiner"
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


def _scheduler(folder: PublishedFolder) -> dict[str, Any]:
    """Nothing in the tensors tells Z-Image from Turbo: who opens the folder may, else `mflux_model.json` does."""
    base = recorded_base_model(str(folder.root)) == "z-image"
    return static_schedule(BASE_SHIFT if base else TURBO_SHIFT)


LAYOUT = Layout(
    title="Z-Image",
    files={
        "transformer": Table(ORIGINAL | NORMS | FUSED, left_out=("norm_final.weight",)),
        "controlnet": as_published,
        "text_encoder": qwen3_024.GGUF,
        "vae": kl_024.SINGLE_FILE,
    },
    inside={
        "text_encoder": ("text_encoders.qwen3_4b.transformer.",),
        "vae": ("vae.", "first_stage_model."),
    },
    changes={"vae": kl_024.as_matrix},
    # Turbo and the base have the same tensors.
    models=lambda _: ("z-image-turbo", "z-image", "z-image-turbo-controlnet-union-2.1"),
    config_optional=("transformer", "controlnet"),
    names=_NAMES,
    configs={
        "transformer": _transformer,
        "text_encoder": _text_encoder,
        "vae": kl_024.config,
        "controlnet": controlnet_config,
    },
    scheduler=_scheduler,
    model_index=_MODEL_INDEX,
    square=_SQUARE,
)

"""ERNIE-Image in other layouts than the published one: folders that mflux 0.24 saved, and single files.

The configurations follow from the shapes, and where no shape tells, they are the published ones.
"""

from __future__ import annotations

from typing import Any

from mflux.checkpoints.published import Layout, PublishedFolder
from mflux.checkpoints.renamed import PREFIXED, Names, Renamed, by_patterns, where
from mflux.models.common.networks.autoencoders import flux2_024, kl_024
from mflux.models.ernie_image.model.text_encoder import ErnieTextConfig

_NAMES: dict[str, Names] = {
    "transformer": by_patterns((r"^adaln_modulation\.", "adaLN_modulation.1.")),
    "vae": by_patterns(*flux2_024.NAMES),
}
_TEXT = "language_model.model"
_SQUARE = (
    ("layers.0.self_attention.to_q", "layers.0.adaLN_sa_ln.weight"),
    (f"{_TEXT}.layers.0.self_attn.q_proj", f"{_TEXT}.layers.0.input_layernorm.weight"),
    *kl_024.SQUARE,
)
_MODEL_INDEX = {
    "_class_name": "ErnieImagePipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Mistral3Model"],
    "tokenizer": ["transformers", "AutoTokenizer"],
    "transformer": ["diffusers", "ErnieImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}
_HEAD = 128


def _scheduler(_: PublishedFolder) -> dict[str, Any]:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 4.0,
        "use_dynamic_shifting": False,
    }  # fmt: skip


def _transformer(tensors: Renamed) -> dict[str, Any]:
    head, width = tensors.rows("layers.0.self_attention.norm_q.weight"), tensors.rows("layers.0.adaLN_sa_ln.weight")
    return {
        "_class_name": "ErnieImageTransformer2DModel",
        "hidden_size": width,
        "num_attention_heads": width // head,
        "num_layers": tensors.count(r"layers\.(\d+)\."),
        "ffn_hidden_size": tensors.rows("layers.0.mlp.gate_proj.weight"),
        "in_channels": tensors.rows("final_linear.bias"),
        "out_channels": tensors.rows("final_linear.bias"),
        "patch_size": 1,
        "text_in_dim": tensors.width("text_proj") if "text_proj.weight" in tensors else width,
        "rope_theta": 256,
        # No shape tells how a head is shared out; in the published proportion.
        "rope_axes_dim": [head // 4, head * 3 // 8, head * 3 // 8],
        "eps": 1e-6,
        "qk_layernorm": True,
    }


def _text_encoder(tensors: Renamed) -> dict[str, Any]:
    layer = f"{_TEXT}.layers.0"
    return {
        "architectures": ["Mistral3Model"],
        "model_type": "mistral3",
        "text_config": {
            "model_type": "mistral",
            "vocab_size": tensors.rows(f"{_TEXT}.embed_tokens.weight"),
            "hidden_size": tensors.rows(f"{layer}.input_layernorm.weight"),
            "intermediate_size": tensors.rows(f"{layer}.mlp.gate_proj.weight"),
            "num_hidden_layers": tensors.count(rf"{_TEXT}\.layers\.(\d+)\."),
            "num_attention_heads": max(tensors.rows(f"{layer}.self_attn.q_proj.weight") // _HEAD, 1),
            "num_key_value_heads": max(tensors.rows(f"{layer}.self_attn.k_proj.weight") // _HEAD, 1),
            "head_dim": _HEAD,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_parameters": dict(ErnieTextConfig().rope_parameters or {}),
            "sliding_window": None,
        },
    }


# As newer versions of transformers call what is in a Mistral 3 with a head.
_WITH_HEAD = where(
    r"^model\.language_model\.",
    by_patterns(
        (r"^model\.language_model\.", f"{_TEXT}."), (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1.")
    ),
)

LAYOUT = Layout(
    title="ERNIE-Image",
    files={"transformer": PREFIXED, "text_encoder": _WITH_HEAD, "vae": flux2_024.SINGLE_FILE},
    inside={"vae": ("vae.", "first_stage_model.")},
    changes={"vae": kl_024.as_matrix},
    # Turbo and the base have the same tensors.
    models=lambda _: ("ernie-image-turbo", "ernie-image"),
    names=_NAMES,
    configs={"transformer": _transformer, "text_encoder": _text_encoder, "vae": flux2_024.config},
    scheduler=_scheduler,
    model_index=_MODEL_INDEX,
    square=_SQUARE,
)

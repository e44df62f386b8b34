"""Qwen3-VL's language model (Qwen team 2025, https://arxiv.org/abs/2511.21631) as a text encoder.

Reference class: transformers' `Qwen3VLModel`. Text alone counts all three axes of its positions as one, so that it is
Qwen3 with another theta; the vision tower in its files is left there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mflux.models.common.networks.decoder import DecoderTextEncoder
from mflux.models.common.networks.qwen3_vl import Qwen3VLTextConfig


@dataclass(frozen=True)
class Qwen3VLEncoderConfig(Qwen3VLTextConfig):
    """`config.json` of a Qwen3-VL, of which the language model's part is read; defaults are the 4B size's."""

    rope_scaling: Mapping[str, Any] | None = field(
        default_factory=lambda: {
            "mrope_interleaved": True, "mrope_section": (24, 20, 20), "rope_type": "default", "rope_theta": 5000000,
        }
    )  # fmt: skip

    kind = "qwen3_vl_text"
    part = "text_config"


class Qwen3VLTextEncoder(DecoderTextEncoder):
    """Token ids → hidden states; a family's subclass says which."""

    config_class = Qwen3VLEncoderConfig
    place = "language_model"
    beside = ("visual.",)

"""Qwen3-VL's language model (Qwen team 2025, https://arxiv.org/abs/2511.21631) as a text encoder.

Reference class: transformers' `Qwen3VLModel`. Text alone counts all three axes of its positions as one, so that it is
Qwen3 with another theta; the vision tower in its files is left there.
"""

from __future__ import annotations

from dataclasses import dataclass

from mflux.models.common.networks.decoder import DecoderTextEncoder
from mflux.models.common.networks.qwen3_vl import Qwen3VLTextConfig


@dataclass(frozen=True)
class Qwen3VLEncoderConfig(Qwen3VLTextConfig):
    """`config.json` of a Qwen3-VL, of which the language model's part is read."""

    kind = "qwen3_vl_text"
    part = "text_config"


class Qwen3VLTextEncoder(DecoderTextEncoder):
    """Token ids → hidden states; a family's subclass says which."""

    config_class = Qwen3VLEncoderConfig
    place = "language_model"
    beside = ("visual.",)

"""Qwen3 (Qwen team 2025, https://arxiv.org/abs/2505.09388) as a text encoder.

Reference class: transformers' `Qwen3Model`, or `Qwen3ForCausalLM` without its head.
"""

from __future__ import annotations

from dataclasses import dataclass

from mflux.models.common.networks.decoder import DecoderConfig, DecoderTextEncoder


@dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    """`config.json` of a Qwen3 model; defaults are those of the 4B size, which Z-Image and FLUX.2 klein 4B use."""

    kind = "qwen3"


class Qwen3TextEncoder(DecoderTextEncoder):
    """Token ids → hidden states; a family's subclass says which in `hidden_states`, as in `(-2,)`."""

    config_class = Qwen3Config

"""YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071): rotary positions of a model that was taught longer texts.

Frequencies that turn often within the length of the first training stay; those that turn less than once become slower
by a factor; between them lies a ramp. They are what they are whatever the length of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mflux.backend import mx

# How often a frequency turns that stays, and one that becomes slower, where the file does not say.
_FAST, _SLOW = 32.0, 1.0


def yarn_frequencies(channels: int, rope: Mapping[str, Any]) -> mx.array:
    """The angle that each pair of channels turns by per position: (channels / 2,), float32."""
    return mx.array(_frequencies(channels, rope).astype(np.float32))


def _frequencies(channels: int, rope: Mapping[str, Any]) -> np.ndarray:
    frequencies: np.ndarray = float(rope["rope_theta"]) ** (-np.arange(0, channels, 2) / channels)
    low, high = _ramp(channels, rope)
    ramp = np.clip((np.arange(channels // 2) - low) / (high - low), 0, 1)
    return frequencies * (1 - ramp + ramp / rope["factor"])


def _ramp(channels: int, rope: Mapping[str, Any]) -> tuple[float, float]:
    """Between which pairs the ramp lies."""

    def pair(turns: float) -> float:
        length = rope["original_max_position_embeddings"]
        return channels * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = pair(rope.get("beta_fast") or _FAST), pair(rope.get("beta_slow") or _SLOW)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    return low, high + 0.001 * (low == high)


def yarn_scale(rope: Mapping[str, Any]) -> float:
    """What cosines and sines are multiplied by."""
    if (told := rope.get("attention_factor")) is not None:
        return float(told)
    ours, all_of_them = rope.get("mscale"), rope.get("mscale_all_dim")
    if ours and all_of_them:
        return _scale(rope["factor"], ours) / _scale(rope["factor"], all_of_them)
    return _scale(rope["factor"], 1.0)


def _scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1


def yarn_problem(channels: int, rope: Mapping[str, Any]) -> str | None:
    """What of these settings makes no sense, as the rest of a sentence, or None."""
    try:
        known = rope["rope_theta"] > 1 and rope["factor"] > 0 and rope["original_max_position_embeddings"] > 0
        with np.errstate(all="ignore"):
            values = _frequencies(channels, rope) if known else np.array([math.nan])
        known = bool(np.isfinite(values).all() and (values > 0).all() and math.isfinite(yarn_scale(rope)))
    except (KeyError, TypeError, ValueError, ArithmeticError):
        known = False
    return None if known else "the settings of its rotary positions (yarn) are missing or make no sense"

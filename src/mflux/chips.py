"""What is best on which chip, as data: what mflux does by itself there, and what it can only advise.

Apple's GPUs by the names that Metal has for them: g13 is M1's, g14 M2's, g15 M3's, g16 M4's, g17 M5's, with a letter
for the size behind. Figures are published ones; nothing here was timed by this project.
"""

from __future__ import annotations

from dataclasses import dataclass

from mflux.backend import has_gpu, mx


@dataclass(frozen=True)
class Rule:
    """
    Attributes:
        chips: how the names of the architectures begin that it is for.
        does: what it comes to, as a person is told it.
        source: where the figures are from.
        rows: rows of a product from which on it holds.
    """

    chips: tuple[str, ...]
    does: str
    source: str
    rows: int = 0

    @property
    def applies(self) -> bool:
        return has_gpu() and architecture().startswith(self.chips)


M1_AND_M2 = ("applegpu_g13", "applegpu_g14")

# MLX's product with packed weights unpacks them anew for each block of rows; with many rows that takes the time.
UNPACKED = Rule(
    M1_AND_M2,
    "quantized layers are unpacked, one at a time, for products of 512 rows and more",
    "Rapid-MLX #3058, on M2 Pro: 4,096 rows 30 to 40 % slower than a plain product; on M3 Ultra no slower",
    rows=512,
)
# bfloat16 is emulated there. A model's values have to fit into float16; its first step tells.
HALF = Rule(
    M1_AND_M2,
    "attention and feed-forwards of weights in bfloat16 compute in float16 (--compute-precision)",
    "mlx #4216, on M1 Max: a 4-bit product in 17 ms instead of 31; omlx #604, on M2 Max: 20 to 34 % a prompt",
)
RULES = (UNPACKED, HALF)


def architecture() -> str:
    """MLX's name for what computes."""
    return str(mx.device_info().get("architecture", ""))


def told() -> list[str]:
    """The rules that apply here, a line for each."""
    return [rule.does for rule in RULES if rule.applies]

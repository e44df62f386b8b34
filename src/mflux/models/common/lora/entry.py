"""The tensors that a LoRA file has for one name, checked against what the name stands for, then read."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import cast

from mflux.backend import mx
from mflux.checkpoints.loading import finite, not_finite
from mflux.checkpoints.readers.opening import Checkpoint
from mflux.errors import CheckpointError
from mflux.models.common.lora import peft
from mflux.models.common.lora.adapters import Adapter, Difference, Kronecker, LowRank, Rows
from mflux.models.common.lora.names import Target
from mflux.models.common.networks.layers import product
from mflux.text import shown

# Part → how names end that hold it. PEFT may put an adapter's name before ".weight".
_PARTS = {
    "down": r"\.(lora_A((?!\.bias$)\.\w+)*|lora_down(\.weight)?|lora(_linear_layer)?\.down\.weight|down\.weight)",
    "up": r"\.(lora_B((?!\.bias$)\.\w+)*|lora_up(\.weight)?|lora(_linear_layer)?\.up\.weight|up\.weight)",
    "bias": r"\.lora_B(\.\w+)*\.bias",
    "alpha": r"\.alpha",
    "diff": r"\.(diff|w_norm)",
    "diff_b": r"\.(diff_b|b_norm)",
    "magnitude": r"\.(dora_scale|lora_magnitude_vector(\.\w+)*)",
    "h1_a": r"\.hada_w1_a",
    "h1_b": r"\.hada_w1_b",
    "h2_a": r"\.hada_w2_a",
    "h2_b": r"\.hada_w2_b",
    "ht1": r"\.hada_t1",
    "ht2": r"\.hada_t2",
    "w1": r"\.lokr_w1",
    "w1_a": r"\.lokr_w1_a",
    "w1_b": r"\.lokr_w1_b",
    "w2": r"\.lokr_w2",
    "w2_a": r"\.lokr_w2_a",
    "w2_b": r"\.lokr_w2_b",
    "t2": r"\.lokr_t2",
}
_PATTERNS = {part: re.compile(rf"(.+?)(?:{ending})") for part, ending in _PARTS.items()}
# Kinds of adapters that are not built, by what stands in the names of their tensors.
_OTHER_KINDS = {
    "OFT or BOFT": r"\.(b?oft_\w+|oft_diag)(\.|$)",
    "GLoRA": r"\.(a1|a2|b1|b2)\.weight$",
    "(IA)³": r"\.(ia3_l(\.|$)|on_input$)",
    "AdaLoRA": r"\.lora_E(\.|$)",
    "VeRA": r"\.?vera_(lambda_[bd]|[AB])(\.|$)",
    "FourierFT": r"\.fourierft_\w+(\.|$)",
    "HRA": r"\.hra_u(\.|$)",
    "Bone or MiSS": r"\.(bone_\w+|miss_\w+)(\.|$)",
    "VB-LoRA": r"\.?vblora_\w+(\.|$)",
    "RandLoRA": r"\.?randlora_\w+(\.|$)",
    "SHiRA": r"\.shira_\w+(\.|$)",
    "C3A": r"\.c3a_\w+(\.|$)",
    "LoRA with a middle factor (LoCon with CP)": r"\.lora_mid(\.|$)",
    "whole weights in place of the model's": r"\.(set_weight|reshape_weight)$",
}


def other_kind(name: str) -> str | None:
    """What kind of adapter a tensor of that name belongs to, if it is one that is not built."""
    return next((kind for kind, pattern in _OTHER_KINDS.items() if re.search(pattern, name)), None)


def parse_name(name: str) -> tuple[str | None, str | None]:
    """The layer's name as it is written, and the part."""
    for part, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(name):
            return match[1], part
    return None, None


class Entry:
    """The tensors of one name in a file, checked against what the name stands for."""

    def __init__(
        self,
        path: Path,
        file: Checkpoint,
        stem: str,
        parts: dict[str, str],
        target: Target,
        settings: peft.Settings,
    ):
        self.path = path
        self.file = file
        self.parts = parts
        self.target = target
        self.stem = stem
        self.shapes = {part: self._shape(name) for part, name in parts.items()}
        self.kronecker = any(part[0] in "wt" for part in parts)
        self.hadamard = any(part[0] == "h" for part in parts)
        self.has_product = self.kronecker or self.hadamard or not parts.keys().isdisjoint(("down", "up", "diff"))
        self.strength = 1.0
        if "diff" in parts:
            self._check_difference()
        elif self.has_product:
            self._check_is_matrix()
            self._check_is_one_kind()
            if self.hadamard:
                rank: int | None = self._check_hadamard()
            else:
                rank = self._check_kronecker() if self.kronecker else self._check_low_rank()
            self.strength = self._strength(rank, settings)
        self._check_magnitude()
        self._check_bias()

    def adapter(self, scale: float, rows: Rows | None) -> Adapter:
        def read() -> tuple[LowRank | Kronecker | Difference, mx.array | None]:
            if "diff" in self.parts:
                return Difference(self._tensor("diff").reshape(self.target.shape), rows), None
            product: Kronecker | LowRank | Difference
            if self.hadamard:
                product = self._hadamard(rows)
            elif self.kronecker:
                product = Kronecker(self._factor("w1"), self._factor("w2"), rows)
            else:
                product = LowRank(self._matrix("down"), self._matrix("up"), rows)
            magnitude = None
            if "magnitude" in self.parts:
                magnitude = self._tensor("magnitude").astype(mx.float32).reshape(self.magnitude_shape)
                if rows is not None and magnitude.shape[1] == 1:
                    magnitude = mx.concatenate([magnitude[start:stop] for start, stop in rows])
            return product, magnitude

        def read_bias() -> mx.array:
            strengths = {"bias": self.strength, "diff_b": 1.0}
            parts = [
                strength * self._tensor(part).astype(mx.float32)
                for part, strength in strengths.items()
                if part in self.parts
            ]
            bias = sum(parts[1:], start=parts[0])
            return bias if rows is None else mx.concatenate([bias[start:stop] for start, stop in rows])

        has_bias = "bias" in self.parts or "diff_b" in self.parts
        readers = (read if self.has_product else None, read_bias if has_bias else None)
        return Adapter(scale, self.strength, *readers, source=self.path)

    # ---- what is checked before anything is read

    def _shape(self, name: str) -> tuple[int, ...]:
        described = self.file.describe(name)
        shape = described.shape
        if shape is None:
            raise CheckpointError(f"{self.path}: {name} is no plain tensor: turn the file with mflux-convert")
        if described.stored.startswith("complex"):
            raise CheckpointError(f"{self.path}: {name} holds complex numbers, and a LoRA's are real: take another one")
        return shape

    def _flat(self, part: str) -> tuple[int, int]:
        """A matrix's shape; kernels of 1 × 1 convolutions count as matrices."""
        shape = self.shapes[part]
        if len(shape) < 2 or not all(shape):
            raise CheckpointError(
                f"{self.path}: {self.parts[part]} has the shape {shown(list(shape))}, and is no matrix"
            )
        return shape[0], math.prod(shape[1:])

    def _check_difference(self) -> None:
        """The whole change of the weights, beside which there can be no other."""
        if beside := self.parts.keys() - {"diff", "diff_b", "alpha"}:
            raise CheckpointError(
                f"{self.path} changes {self.stem} twice: as {self.parts['diff']} and as {self.parts[min(beside)]}"
            )
        shape = self.shapes["diff"]
        if len(self.target.shape) == 2:
            shape = self._flat("diff")
        if shape != self.target.shape:
            raise CheckpointError(
                f"{self.path} does not fit this model: {self.parts['diff']} has the shape {shown(list(shape))}, and "
                f"here it is {list(self.target.shape)}"
            )

    def _check_is_matrix(self) -> None:
        if len(self.target.shape) != 2:
            raise CheckpointError(f"{self.path} changes {self.stem} by factors, and here that is a norm")

    def _check_low_rank(self) -> int:
        for part, other in (("down", "up"), ("up", "down")):
            if part not in self.parts:
                have = self.parts[other]
                raise CheckpointError(f"{self.path} is incomplete: it has {have} without its {part} part")
        (rank, width), (height, inner) = self._flat("down"), self._flat("up")
        if rank != inner:
            raise CheckpointError(
                f"{self.path} is damaged: {self.parts['down']} has the rank {rank} and {self.parts['up']} {inner}"
            )
        self._check_shape((height, width))
        return rank

    def _check_is_one_kind(self) -> None:
        """A layer is changed by one product: LyCORIS and PEFT write no others, and half of a change is none."""
        kinds = {"w": "LoKr", "t": "LoKr", "h": "LoHa"}
        found = {kinds.get(part[0], "LoRA") for part in self.parts if part in ("down", "up") or part[0] in kinds}
        for side in ("w1", "w2"):
            factors = self.parts.keys() & {f"{side}_a", f"{side}_b"}
            if side in self.parts and factors:
                raise CheckpointError(
                    f"{self.path} changes {self.stem} twice: as {self.parts[side]} and as {self.parts[min(factors)]}"
                )
        if len(found) > 1:
            raise CheckpointError(f"{self.path} changes {self.stem} twice: as {' and as '.join(sorted(found))}")

    def _check_hadamard(self) -> int:
        """LoHa (Yeh et al. 2023): (w1_a · w1_b) ∘ (w2_a · w2_b)."""
        rank, sides = 0, []
        for side, core in (("h1", "ht1"), ("h2", "ht2")):
            for half in "ab":
                if f"{side}_{half}" not in self.parts:
                    raise CheckpointError(f"{self.path} is incomplete: {self.stem} has no hada_w{side[1]}_{half}")
            (height, inner), (rank, width) = self._flat(f"{side}_a"), self._flat(f"{side}_b")
            if core in self.parts:
                # Here the first factor lies on its side.
                inner, height = height, inner
                shape = self.shapes[core]
                if len(shape) < 2 or shape[:2] != (inner, rank):
                    raise CheckpointError(f"{self.path} is damaged: {self.parts[core]} does not fit its factors")
                width *= math.prod(shape[2:])
            elif inner != rank:
                raise CheckpointError(
                    f"{self.path} is damaged: the factors of {self.stem}'s hada_w{side[1]} do not fit"
                )
            sides.append((height, width))
        if sides[0] != sides[1]:
            raise CheckpointError(f"{self.path} is damaged: the two products of {self.stem} differ in shape")
        self._check_shape(sides[0])
        return rank

    def _check_kronecker(self) -> int | None:
        rank = None
        sides = []
        for side in ("w1", "w2"):
            if side in self.parts:
                sides.append(self._flat(side))
                continue
            if f"{side}_a" not in self.parts or f"{side}_b" not in self.parts:
                raise CheckpointError(f"{self.path} is incomplete: {self.stem} has no lokr_{side}, nor its two factors")
            (height, inner), (rank, width) = self._flat(f"{side}_a"), self._flat(f"{side}_b")
            if side == "w2" and "t2" in self.parts:
                # Here the first factor lies on its side.
                shape = self.shapes["t2"]
                inner, height = height, inner
                if len(shape) < 2 or shape[:2] != (inner, rank):
                    raise CheckpointError(f"{self.path} is damaged: {self.parts['t2']} does not fit its factors")
                width *= math.prod(shape[2:])
            elif inner != rank:
                raise CheckpointError(f"{self.path} is damaged: the factors of {self.stem}'s {side} do not fit")
            sides.append((height, width))
        self._check_shape((sides[0][0] * sides[1][0], sides[0][1] * sides[1][1]))
        return rank

    def _check_shape(self, shape: tuple[int, int]) -> None:
        if shape != self.target.shape:
            raise CheckpointError(
                f"{self.path} does not fit this model: {self.stem} changes a matrix of {shape[0]} × {shape[1]}, and "
                f"here it has {self.target.shape[0]} × {self.target.shape[1]}"
            )

    def _check_magnitude(self) -> None:
        if "magnitude" not in self.parts:
            return
        height, width = self.target.shape
        shape = self.shapes["magnitude"]
        if math.prod(shape) == height and (len(shape) < 2 or shape[0] == height):
            self.magnitude_shape = (height, 1)
        elif math.prod(shape) == width and len(self.target.parts) == 1:
            self.magnitude_shape = (1, width)
        elif math.prod(shape) == width:
            raise CheckpointError(
                f"{self.path}: {self.parts['magnitude']} scales the columns of several layers at once, which is not "
                "built: take a version of this LoRA without DoRA"
            )
        else:
            raise CheckpointError(
                f"{self.path}: {self.parts['magnitude']} has the shape {shown(list(shape))} for a matrix of "
                f"{height} × {width}"
            )

    def _check_bias(self) -> None:
        for part in ("bias", "diff_b"):
            if part in self.parts and self.shapes[part] != self.target.shape[:1]:
                raise CheckpointError(
                    f"{self.path}: {self.parts[part]} has the shape {shown(list(self.shapes[part]))} for a layer of "
                    f"{self.target.shape[0]} outputs"
                )

    def _strength(self, rank: int | None, settings: peft.Settings) -> float:
        if "alpha" not in self.parts:
            by_settings = self.kronecker or self.hadamard
            strength = peft.strength(self.stem, self.target.component, rank, settings, kronecker=by_settings)
        elif rank is None:
            # Both factors of a Kronecker product in full: LyCORIS takes alpha for the rank then.
            return 1.0
        else:
            if math.prod(self.shapes["alpha"]) != 1:
                raise CheckpointError(f"{self.path}: {self.parts['alpha']} is not one number")
            strength = cast(float, self.file[self.parts["alpha"]].astype(mx.float32).item()) / rank
        if not math.isfinite(strength):
            raise CheckpointError(f"{self.path}: the strength of {self.stem} is not a finite number")
        return strength

    # ---- reading

    def _tensor(self, part: str) -> mx.array:
        """A tensor as the file has it.

        Raises:
            CheckpointError: some of its numbers are not finite.
        """
        name = self.parts[part]
        value = self.file[name]
        if not finite(value, self.path):
            raise CheckpointError(not_finite(self.path, name, "this LoRA"))
        return value

    def _matrix(self, part: str) -> mx.array:
        return self._tensor(part).reshape(self._flat(part))

    def _hadamard(self, rows: Rows | None) -> LowRank | Difference:
        """The elementwise product of two products as one product of matrices, (ranks, in) and (out, ranks), in float32:
        each column of one first factor times each of the other's, and rows of the second factors likewise. Where these
        would be larger than the whole, that stands for them."""
        (a1, b1), (a2, b2) = (self._side(side, core) for side, core in (("h1", "ht1"), ("h2", "ht2")))
        height, width = self.target.shape
        if a1.shape[1] * a2.shape[1] * (height + width) >= height * width:
            return Difference(product(a1, b1.T) * product(a2, b2.T), rows)
        up = (a1[:, :, None] * a2[:, None, :]).reshape(height, -1)
        return LowRank((b1[:, None, :] * b2[None, :, :]).reshape(-1, width), up, rows)

    def _side(self, side: str, core: str) -> tuple[mx.array, mx.array]:
        a, b = (self._matrix(f"{side}_{half}").astype(mx.float32) for half in "ab")
        if core not in self.parts:
            return a, b
        values = self._tensor(core).astype(mx.float32)
        inner, outer = values.shape[:2]
        places = mx.einsum("ijk,jr->irk", values.reshape(inner, outer, -1), b)
        return a.T, places.reshape(inner, -1)

    def _factor(self, side: str) -> mx.array:
        """w1 or w2, multiplied out of its own factors if need be, in float32."""
        if side in self.parts:
            return self._matrix(side).astype(mx.float32)
        a, b = (self._matrix(f"{side}_{half}").astype(mx.float32) for half in "ab")
        if side == "w1" or "t2" not in self.parts:
            return product(a, b.T)
        core = self._tensor("t2").astype(mx.float32)
        inner, outer = core.shape[:2]
        # Over both ranks: aᵀ · core · b, with the kernel's places, which a linear layer counts to its inputs, last.
        w2 = mx.einsum("ijk,ip,jr->prk", core.reshape(inner, outer, -1), a, b)
        return w2.reshape(w2.shape[0], -1)

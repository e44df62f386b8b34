"""What a model takes: bytes on disk, memory at its largest stage, and the Mac that it fits.

Nothing is loaded: each component's own module is built from a configuration, as shapes, and what its parameters would
take is added up. What is computed on top is a rule, which benchmarks/stages.md holds beside measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from mflux.backend import mx, named_arrays, nn
from mflux.checkpoints.late import late_layers
from mflux.checkpoints.quantization import Quantization, packed_specs, planned
from mflux.models.common.family import STAGES, Component, family_of, first_command, load_object
from mflux.models.common.networks.autoencoders.budget import ROOM
from mflux.utils.scale_factor import GRID

# A stage takes this part of its weights beside them, if no more: what is read ahead, casts, MLX's own buffers.
_BESIDE = 0.15
# Arrays as wide as a transformer's stream of tokens that a block has at once, a feed-forward's four times as wide ones
# included; text is counted as 512 tokens.
_STREAMS = 24
_WORDS = 512
# A Mac's memory, in GB as Apple counts them (2^30), and what Metal recommends a program to take of it at most: two
# thirds, of more than 32 GB three quarters.
MACS = (16, 24, 32, 64, 128)


def weights(module: nn.Module, bits: int | None = None, *, late: bool = False) -> int:
    """Bytes of a module's parameters, in 16 bits or quantized as `-q` would.

    Args:
        late: without the layers whose weights stay in their file.
    """
    left = late_layers(module) if late else {}
    plan = {} if bits is None else planned(module, Quantization(bits))
    total = 0
    for name, value in named_arrays(module.parameters()):
        if name.rpartition(".")[0] in left:
            continue
        found = plan.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if found is None:
            total += 2 * value.size
        else:
            specs = packed_specs(mx.bfloat16, value.shape, found)
            total += sum(dtype.size * prod(shape) for dtype, shape in specs.values())
    return total


@dataclass(frozen=True)
class Footprint:
    """What one model takes with so many bits a weight.

    Attributes:
        bits: 16, or what weights are quantized to.
        disk: bytes of a folder that `mflux-save` writes, or of a published one in 16 bits.
        peak: bytes of memory at the largest stage of one image.
        stage: which that is, one of `STAGES`.
    """

    bits: int
    disk: int
    peak: int
    stage: str

    @property
    def mac(self) -> int | None:
        """The smallest of `MACS` whose recommended working set holds the peak, or None."""
        return next((gigabytes for gigabytes in MACS if self.peak <= working_set(gigabytes)), None)


def working_set(gigabytes: int) -> int:
    """Bytes that Metal recommends a program to take at most, on a Mac with so much memory (`iogpu.wired_limit_mb` set
    by its owner aside). A Mac tells its own: `mx.device_info()["max_recommended_working_set_size"]`."""
    return (gigabytes << 30) * 2 // 3 if gigabytes <= 32 else (gigabytes << 30) * 3 // 4


def components(key: str) -> tuple[Component, ...]:
    """The components that a model's first command loads, by its key in `registry.MODELS`."""
    command = first_command(key)
    if command is None:
        raise LookupError(f"no command generates with {key}")
    found: tuple[Component, ...] = load_object(command.pipeline).components
    return found


def published_config(key: str, component: Component) -> dict[str, Any]:
    """What the published `config.json` of a component says where it differs from its class's defaults."""
    return dict(family_of(key).published.get(key, {}).get(component.name, {}))


def footprint(
    key: str,
    bits: int | None = None,
    *,
    width: int = 1024,
    height: int = 1024,
    configs: Mapping[str, Any] | None = None,
) -> Footprint:
    """What a model takes for one image.

    Args:
        key: the model, in `registry.MODELS`.
        bits: what its weights are quantized to; None for 16.
        width, height: pixels.
        configs: what the `config.json` of each component says, by folder, instead of the published ones.
    """
    disk, stages = 0, dict.fromkeys(STAGES, 0)
    for component in components(key):
        kind = component.module_class()
        values = (configs or {}).get(component.folder)
        config = kind.config_class.from_dict(published_config(key, component) if values is None else values)
        own = weights(kind(config), bits)
        whole = getattr(kind, "saved_class", kind)
        disk += own if whole is kind else weights(whole(config), bits)
        if component.stage == "encode":
            # One after the other.
            stages["encode"] = max(stages["encode"], round(own * (1 + _BESIDE)))
        elif component.stage == "decode":
            stages["decode"] += own + 2 * ROOM
        else:
            tokens = (width // GRID) * (height // GRID) + _WORDS
            working = 2 * _STREAMS * tokens * config.inner_dim if hasattr(config, "inner_dim") else 0
            own = weights(kind(config), bits, late=True)
            stages["denoise"] += own + max(round(own * _BESIDE), working if component.name == "transformer" else 0)
    stage = max(stages, key=lambda name: stages[name])
    return Footprint(bits or 16, disk, stages[stage], stage)

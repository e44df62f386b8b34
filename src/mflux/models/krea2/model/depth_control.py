"""Krea 2's depth ControlNet (Patil 2026, https://huggingface.co/Patil/Krea-2-depth-controlnet): low-rank changes to the
transformer's blocks, and an entrance that takes the depth map's latents beside the image's.

The file has the authors' names, no configuration, and one number for each change: what is multiplied by a strength are
the changes to the blocks, and not the entrance, which takes the place of the transformer's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mflux.backend import mx, nn
from mflux.checkpoints.loading import finite, not_finite
from mflux.checkpoints.quantization import UNQUANTIZED
from mflux.checkpoints.stored.tensors import spec
from mflux.errors import CheckpointError
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.lora.adapters import Adapter, LowRank
from mflux.models.common.networks.layers import Linear
from mflux.models.krea2.lora_names import ORIGINAL
from mflux.models.krea2.model.transformer import Krea2Transformer, Krea2TransformerConfig

_ENTRANCE = ("img_in.weight", "img_in.bias", "control_in.weight")
_ATTENTION, _FORWARD = ("wq", "wk", "wv", "wo", "gate"), ("gate", "up", "down")


@dataclass(frozen=True)
class DepthControlConfig(ComponentConfig):
    """Sizes of the transformer that it changes, and of its changes; defaults are the published one's."""

    width: int = 6144
    in_channels: int = 64
    key_width: int = 1536
    hidden: int = 16384
    rank: int = 64
    num_layers: int = 28

    def misfit(self, transformer: Krea2TransformerConfig) -> str | None:
        """What of the transformer is of another size, as the rest of a sentence, or None."""
        theirs = {
            "width": transformer.inner_dim,
            "in_channels": transformer.in_channels,
            "key_width": transformer.num_key_value_heads * transformer.attention_head_dim,
            "hidden": transformer.intermediate_size,
            "num_layers": transformer.num_layers,
        }
        wrong = [f"{name} is {getattr(self, name)} and not {value}" for name, value in theirs.items()
                 if getattr(self, name) != value]  # fmt: skip
        return ", ".join(wrong) or None


class Change(nn.Module):
    """B · A, which is added to a layer's weights (out, in)."""

    def __init__(self, out: int, width: int, rank: int):
        super().__init__()
        self.A = mx.zeros((rank, width))
        self.B = mx.zeros((out, rank))


class ControlBlock(nn.Module):
    def __init__(self, config: DepthControlConfig):
        super().__init__()
        width, rank = config.width, config.rank
        outs = {name: config.key_width if name in ("wk", "wv") else width for name in _ATTENTION}
        self.attn = {name: Change(out, width, rank) for name, out in outs.items()}
        sizes = {"gate": (config.hidden, width), "up": (config.hidden, width), "down": (width, config.hidden)}
        self.mlp = {name: Change(*size, rank) for name, size in sizes.items()}


class DepthControl(nn.Module):
    """What the file holds."""

    config_class = DepthControlConfig
    # It goes into the transformer's weights before these are quantized.
    least_bits = {"": UNQUANTIZED}

    def __init__(self, config: DepthControlConfig):
        super().__init__()
        self.config = config
        self.first = Linear(2 * config.in_channels, config.width)
        self.blocks = [ControlBlock(config) for _ in range(config.num_layers)]


class Krea2ControlTransformer(Krea2Transformer):
    """A transformer whose entrance takes a depth map's latents beside the image's.

    One matrix for both is two here, so that a LoRA of the entrance fits, and means the image's half.
    """

    saved_class = Krea2Transformer
    # What its own files hold; the rest comes with the ControlNet.
    stored_class = Krea2Transformer

    def __init__(self, config: Krea2TransformerConfig):
        super().__init__(config)
        self.control_in = Linear(config.in_channels, config.inner_dim, bias=False)


class WithEntrance(Mapping[str, mx.array]):
    """A transformer's tensors with a ControlNet's entrance in the place of its own.

    Args:
        tensors: the transformer's, quantized or not.
        control: the ControlNet's.
    """

    def __init__(self, tensors: Mapping[str, mx.array], control: Mapping[str, mx.array]):
        self._tensors, self._control = tensors, control
        # Its own may be packed, and have more than weights and a bias.
        self._names = dict.fromkeys([*(name for name in tensors if not name.startswith("img_in.")), *_ENTRANCE])

    def __getitem__(self, name: str) -> mx.array:
        if name not in self._names:
            raise KeyError(name)
        return self._entrance(name, self._control["first.weight"]) if name in _ENTRANCE else self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def spec(self, name: str) -> mx.array:
        if name not in _ENTRANCE:
            return spec(self._tensors, name)
        whole = spec(self._control, "first.weight")
        return self._entrance(name, mx.zeros(whole.shape, whole.dtype))

    def _entrance(self, name: str, whole: mx.array) -> mx.array:
        if name == "img_in.bias":
            return self._control["first.bias"]
        image, control = mx.split(whole, 2, axis=1)
        return mx.contiguous(image if name == "img_in.weight" else control)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def adapters(
    control: Mapping[str, mx.array], config: DepthControlConfig, strength: float, source: object
) -> dict[str, Adapter]:
    """What is added to each layer of the transformer's blocks; nothing is read before it is needed."""
    found = {}
    for number in range(config.num_layers):
        for part, names in (("attn", _ATTENTION), ("mlp", _FORWARD)):
            for name in names:
                (layer,) = ORIGINAL[f"blocks.{{i}}.{part}.{name}"]
                stem = f"blocks.{number}.{part}.{name}"

                def read(stem: str = stem) -> tuple[LowRank, None]:
                    down, up = (control[f"{stem}.{half}"] for half in "AB")
                    for half, value in (("A", down), ("B", up)):
                        if not finite(value, source):
                            raise CheckpointError(not_finite(source, f"{stem}.{half}", "this ControlNet"))
                    return LowRank(down, up), None

                found[layer.replace("{i}", str(number))] = Adapter(strength, 1.0, read, source=source)
    return found

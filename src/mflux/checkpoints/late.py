"""Linear layers whose weights stay in their file until somebody needs them, and go again.

A layer whose class says `read_late` sees one vector a step. Its matrix may be as large as any other, and stands in
memory for nothing: what it makes of all vectors can be worked out at once, and kept in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mflux.backend import mx, nn


class LateLinear(nn.Module):
    """Stands where such a layer stands in a module. It has no parameters.

    Args:
        read: gives the layer with its weights, anew each time.
        packed: whether they are stored quantized.
    """

    def __init__(self, read: Callable[[], nn.Module], *, packed: bool):
        super().__init__()
        self._read = read
        self.packed = packed
        # Counts the layers that were made of it: what came of another one is no longer right.
        self.version = 0
        self._change: Callable[[nn.Module], nn.Module] | None = None
        self._kept: Callable[[mx.array], mx.array] | None = None

    def read(self) -> Any:
        """The layer; its weights are let go of with it.

        Raises:
            CheckpointError: its file is damaged, has changed since, or holds numbers that are not finite.
        """
        layer = self._read()
        return layer if self._change is None else self._change(layer)

    def change(self, change: Callable[[nn.Module], nn.Module] | None) -> None:
        """Have another layer made of it each time that it is read; None: none any more."""
        self._change = change
        self.version += 1
        object.__setattr__(self, "_kept", None)

    def __call__(self, x: mx.array) -> mx.array:
        """Nobody knew of this vector before: the weights stay from here on, for others like it."""
        if self._kept is None:
            # Not as an attribute of MLX's, which would count as a child.
            object.__setattr__(self, "_kept", self.read())
        assert self._kept is not None
        return self._kept(x)


def late_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of a module that may be read late, by their paths."""
    return {path: layer for path, layer in module.named_modules() if getattr(layer, "read_late", False)}

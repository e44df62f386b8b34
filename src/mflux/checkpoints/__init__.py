"""Weights files in, arrays out.

`load_checkpoint` reads a file or folder of weights whatever its format; `open_checkpoint` does so tensor by tensor.
"""

from typing import Any

__all__ = ["load_checkpoint", "open_checkpoint"]


def __getattr__(name: str) -> Any:
    # The readers need MLX, which `import mflux.checkpoints` should not load.
    if name in __all__:
        from mflux.checkpoints.readers import opening

        return getattr(opening, name)
    raise AttributeError(f"module 'mflux.checkpoints' has no attribute {name!r}")

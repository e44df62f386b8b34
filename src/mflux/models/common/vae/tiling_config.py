"""mflux 0.24's path to `TilingConfig`."""

from mflux.models.common.networks.autoencoders.tiling import TilingConfig

__all__ = ["TilingConfig"]

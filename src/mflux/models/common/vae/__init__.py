from mflux.models.common.autoencoders.tiling import TilingConfig

__all__ = ["TilingConfig"]

from mflux.models.common.networks.autoencoders.tiling import TilingConfig

__all__ = ["TilingConfig"]

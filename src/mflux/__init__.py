"""Generative image models on Apple's MLX, without torch.

Importing this package imports nothing heavy; the classes live at the paths that mflux 0.24 gave them, for example
`mflux.models.flux.variants.txt2img.flux.Flux1`.
"""

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from mflux.utils.version_util import VersionUtil

        return VersionUtil.get_mflux_version()
    raise AttributeError(f"module 'mflux' has no attribute {name!r}")

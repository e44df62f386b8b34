"""Width and height from numbers, scale factors, a source picture and a default."""

from __future__ import annotations

from pathlib import Path

from mflux.utils.picture_files import oriented_size
from mflux.utils.scale_factor import ScaleFactor


class DimensionResolver:
    @staticmethod
    def resolve(
        height: int | ScaleFactor | None,
        width: int | ScaleFactor | None,
        reference_image_path: Path | str | None = None,
        default: int = 1024,
    ) -> tuple[int, int]:
        """The size in pixels as (width, height).

        A number stands for itself. A scale factor, or None, which is 1x, asks for the source picture's side as it is
        displayed; without a source it means `default`.

        Raises:
            ImageError: the source picture cannot be read.
        """
        if isinstance(width, int) and isinstance(height, int):
            return width, height
        source = (default, default)
        if reference_image_path is not None:
            source = oriented_size(reference_image_path)

        def side(wanted: int | ScaleFactor | None, original: int) -> int:
            if isinstance(wanted, int):
                return wanted
            if reference_image_path is None:
                return default
            return (wanted or ScaleFactor(1)).get_scaled_value(original)

        return side(width, source[0]), side(height, source[1])

"""A map of how far everything on an image is, for models that generate after one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image

from mflux.models.common.memory import digest_of, give_back_memory
from mflux.models.common.pipeline import Pipeline
from mflux.utils.image_util import ImageUtil


class FindsDepth(Pipeline):
    """Base of a class that finds an image's depth with Depth Pro.

    Attributes:
        depth_pro: a program's own Depth Pro, which it keeps; None has one loaded for each image and let go.
    """

    depth_pro: Any = None

    def find_depth(self, image_path: Path | str) -> PIL.Image.Image:
        """An image's depth map; found once, and Depth Pro is released before the transformer is loaded."""

        def find(_: object) -> Iterator[PIL.Image.Image]:
            from mflux.models.common.controls.depth_pro.depth_pro import DepthPro

            depth_pro = self.depth_pro or DepthPro(quantize=self._quantize)
            yield depth_pro.create_depth_map(image_path).depth_image
            del depth_pro
            give_back_memory()

        (depth,) = self.remembered([("depth", digest_of(ImageUtil.load_image(image_path)))], find)
        return depth

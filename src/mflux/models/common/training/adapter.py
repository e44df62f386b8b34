"""What a family adds to training: which layers, how its images and prompts are encoded, how its velocity is predicted.

All of it goes through the family's pipeline, so that training cannot disagree with generating.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from mflux.backend import mx
from mflux.models.common.config.config import Config
from mflux.models.common.tokenizers.checks import check_prompt


class TrainingAdapter(ABC):
    """Base of the families' adapters. A subclass has the class attributes, `condition` and `velocity`.

    Attributes:
        targets: ends of the paths of the layers that are trained where a configuration names none.
        blocks: the transformer's lists of blocks, in the order in which they are called.
        spelled: other names of layers that a configuration may have: mflux 0.24's, by a table as `lora_names` has it.
        prefix: what stands before the layers' names in an adapter's file.
        stacks: whether images of one size, with conditions of one shape, go through the transformer together.
    """

    targets: ClassVar[tuple[str, ...]]
    blocks: ClassVar[tuple[str, ...]]
    spelled: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    prefix: ClassVar[str] = "transformer"
    stacks: ClassVar[bool] = True

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline

    def words(self, caption: str) -> str:
        """What of a caption the text encoder reads."""
        return caption

    def check(self, caption: str) -> None:
        """
        Raises:
            UsageError: the model cannot read such a caption.
        """
        check_prompt(caption, "caption")

    def latents(self, image: Path, width: int, height: int) -> mx.array:
        """An image as the transformer takes it, without noise: a batch of one, float32."""
        encoded: mx.array = self.pipeline.encode_image(image, height, width)
        return encoded

    def beside(self, image: Path) -> dict[str, mx.array]:
        """What the transformer is told of the image that an edit starts from."""
        raise AssertionError(f"{type(self).__name__} learns from no pairs")

    @abstractmethod
    def condition(self, encoded: Any) -> dict[str, mx.array]:
        """What `encode_prompts` gives for a prompt, as arrays by name, each a batch of one."""

    @abstractmethod
    def velocity(self, config: Config, latents: mx.array, sigmas: mx.array, cond: Mapping[str, mx.array]) -> mx.array:
        """The velocity noise - image that the model predicts.

        Args:
            config: with the images' size.
            latents: (B, …), as `latents` gives them, with noise.
            sigmas: (B,).
            cond: as `condition` gives it, for each image.
        """

    def preview(self, image: Path | None) -> dict[str, Any]:
        """Further arguments of `generate_image` for a preview."""
        return {}

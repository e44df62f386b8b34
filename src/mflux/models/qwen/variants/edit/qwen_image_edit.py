"""Qwen-Image-Edit: images changed, or put together, as words say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL.Image

from mflux.backend import mx
from mflux.checkpoints.folders import read_json
from mflux.errors import CheckpointError, UsageError
from mflux.models.common.memory import LazyComponent, digest_of
from mflux.models.common.networks.image_processors import VLImageProcessor
from mflux.models.common.networks.qwen2_5_vl import Qwen25VLEncoder
from mflux.models.common.networks.qwen_vl import spread_image_tokens
from mflux.models.common.sizes import MEGAPIXEL, fitted, nearest
from mflux.models.common.tokenizers.qwen import chat
from mflux.models.qwen.family import EDIT_COMPONENTS
from mflux.models.qwen.latent_creator.qwen_latent_creator import QwenLatentCreator
from mflux.models.qwen.pipeline import NOTHING, QwenPipeline
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.image_util import ImageUtil

# The model was trained with exactly this before each prompt; so many tokens of what comes out are the template's.
SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
_TEMPLATE_TOKENS = 64
_PICTURE_TOKEN = "<|image_pad|>"
_VISION = f"<|vision_start|>{_PICTURE_TOKEN}<|vision_end|>"
# Pixels of a picture as it is encoded, and as the language model of the later releases is shown it.
_AREA, _SHOWN_AREA = MEGAPIXEL, 384 * 384
ROUNDING = nearest(32)
_FIRST_RELEASE = "QwenImageEditPipeline"


class QwenImageEdit(QwenPipeline):
    """Qwen-Image-Edit 2509 and 2511, which take several images, and the first release, which takes one; see `Model`.

    The model's folder says which of them it is: `model_index.json` and the transformer's `zero_cond_t`.
    """

    components = EDIT_COMPONENTS
    default_model = "qwen-image-edit"
    text_encoder: LazyComponent[Qwen25VLEncoder]

    def opened(self) -> None:
        super().opened()
        # mflux 0.24's second one spreads the pictures' tokens as well.
        self.tokenizers = {**self.tokenizers, "qwen_vl": self.tokenizers["qwen"]}
        # What is wrong with these is told now.
        _ = self.takes_one, self.processor, self.image_token

    @cached_property
    def takes_one(self) -> bool:
        """Whether it is the first release, which takes one image."""
        index = self._json("model_index.json")
        return index.get("_class_name") == _FIRST_RELEASE

    @cached_property
    def processor(self) -> VLImageProcessor:
        """What the text encoder is shown of an image."""
        path = "processor/preprocessor_config.json"
        return VLImageProcessor.from_dict(self._json(path), source=(self.folder_root or Path()) / path)

    @cached_property
    def image_token(self) -> int:
        """
        Raises:
            CheckpointError: the tokenizer does not know it.
        """
        token = self.tokenizers["qwen"].encode(_PICTURE_TOKEN)
        if len(token) != 1:
            raise CheckpointError(
                f"{self.root / 'tokenizer'} does not know {_PICTURE_TOKEN}, which stands for a picture: take the "
                "tokenizer of a Qwen-Image-Edit"
            )
        number: int = token[0]
        return number

    def _json(self, path: str) -> dict[str, Any]:
        """A file of settings in the model's folder; nothing where it is not there."""
        if self.folder_root is None or not (self.folder_root / path).is_file():
            return {}
        return read_json(self.folder_root / path)

    @property
    def qwen_vl_encoder(self) -> Qwen25VLEncoder:
        """mflux 0.24's name for the text encoder with its eyes."""
        return self.text_encoder

    def generate_image(
        self,
        seed: int,
        prompt: str,
        image_paths: Sequence[Path | str],
        num_inference_steps: int = 4,
        height: int | None = None,
        width: int | None = None,
        guidance: float = 4.0,
        image_path: Path | str | None = None,
        scheduler: str | None = None,
        negative_prompt: str | None = None,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Edit images; arguments and errors are those of `QwenImage.generate_image` but for these.

        Args:
            prompt: what to change; encoded once for the same images and kept.
            image_paths: the images to start from, which the prompt may call Picture 1, Picture 2, …
            height, width: in pixels, rounded down to multiples of 16; None for about a million pixels in the shape of
                the last image.
            image_path: an image whose shape is taken instead of the last one's.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.
        """
        pictures = self._pictures(image_paths)
        shape = pictures[-1] if image_path is None else ImageUtil.load_image(image_path)
        natural_width, natural_height = fitted(shape.size, _AREA, ROUNDING)
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=natural_height if height is None else height,
            width=natural_width if width is None else width,
            guidance=guidance,
            scheduler=scheduler,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )

        # 1. Encode the prompts together with the pictures
        prompts = [prompt, negative_prompt or NOTHING] if config.guidance > 1 else [prompt]
        encoded = self.encode_prompts(*prompts, images=pictures)

        # 2. Make the latents to start from, and those of the pictures
        latents = QwenLatentCreator.create_noise(seed, config.height, config.width)
        sizes = [fitted(picture.size, _AREA, ROUNDING) for picture in pictures]
        sources = [
            self.encode_image(picture, height, width) for picture, (width, height) in zip(pictures, sizes, strict=True)
        ]

        # 3. Denoise
        grids = [(height // 16, width // 16) for width, height in sizes]
        velocity = self.predictor(config, *encoded, sources=sources, source_grids=grids)
        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt)

        # 4. Decode
        return self.make_image(
            config,
            latents,
            seed=seed,
            prompt=prompt,
            negative_prompt=negative_prompt,
            image_path=image_path,
            image_paths=list(image_paths),
        )

    def _pictures(self, paths: Sequence[Path | str]) -> list[PIL.Image.Image]:
        """
        Raises:
            UsageError: none, or more than the model takes.
            ImageError: one cannot be read.
        """
        if isinstance(paths, (str, Path)) or not paths:
            raise UsageError("image_paths (--image-paths) is no list of pictures: name one or more to start from")
        if self.takes_one and len(paths) > 1:
            raise UsageError(
                f"{self.root} is the first release of Qwen-Image-Edit, which takes one picture, and there are "
                f"{len(paths)}: name one, or use --model qwen-image-edit (2509) or qwen-image-edit-2511"
            )
        return [ImageUtil.load_image(path) for path in paths]

    def encode_prompts(self, *prompts: str, images: Sequence[PIL.Image.Image]) -> list[mx.array]:
        """Embeddings (1, L, D) of prompts about images."""

        def encode(missing: list[tuple[str, tuple[bytes, ...]]]) -> Iterator[mx.array]:
            shown = [ImageUtil.scale_to_dimensions(image, *self._shown(image)) for image in images]
            patches, grids = self.processor.batch(shown)
            for prompt, _ in missing:
                ids = self._ids(prompt, grids)
                embeds = self.text_encoder(ids, patches, grids, image_token=self.image_token)[:, _TEMPLATE_TOKENS:]
                mx.eval(embeds)
                yield embeds

        about = tuple(digest_of(image) for image in images)
        return self.remembered([(prompt, about) for prompt in prompts], encode, "text_encoder")

    def _shown(self, picture: PIL.Image.Image) -> tuple[int, int]:
        return fitted(picture.size, _AREA if self.takes_one else _SHOWN_AREA, ROUNDING)

    def _ids(self, prompt: str, grids: Sequence[Any]) -> list[int]:
        """A prompt's tokens, with one for each token that a picture becomes.

        Raises:
            UsageError: the prompt holds the token that stands for a picture.
        """
        if self.takes_one:
            before = _VISION
        else:
            before = "".join(f"Picture {number}: {_VISION}" for number in range(1, len(grids) + 1))
        if _PICTURE_TOKEN in prompt:
            raise UsageError(f"the prompt contains {_PICTURE_TOKEN}, which stands for a picture: leave it out")
        ids = self.tokenizers["qwen"].encode(chat(before + prompt, system=SYSTEM))
        return spread_image_tokens(ids, self.image_token, grids, self.processor.merge_size)

"""A conversation with pictures as the model reads it: token ids and patches.

Tokenizer and chat template are those of transformers, without torch. They are composed here because its
`AutoProcessor` asks for torchvision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from mflux.backend import mx
from mflux.checkpoints.folders import read_json
from mflux.errors import CheckpointError, UsageError
from mflux.models.common.networks.image_processors import VLImageProcessor
from mflux.models.common.networks.qwen3_vl import Qwen3VLConfig
from mflux.models.common.networks.qwen_vl import spread_image_tokens
from mflux.models.common.networks.vision import Grid
from mflux.models.fibo.vlm.packages import import_transformers
from mflux.utils.image_util import ImageUtil

# How FIBO-VLM is shown pictures: shrunk or enlarged to so many pixels, values from -1 to 1.
MIN_PIXELS, MAX_PIXELS = 256 * 28 * 28, 1024 * 28 * 28
MEAN = STD = (0.5, 0.5, 0.5)

# Qwen2-VL's conversations, for repositories without a chat template of their own: each turn between two marks, a
# picture as one token between two others, and a system turn before everything where there is none.
CHAT_TEMPLATE = (
    "{% set newline = '\\n' %}"
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system' + newline + 'You are a helpful assistant.<|im_end|>' + newline }}"
    "{% endif %}"
    "{% for turn in messages %}"
    "{{ '<|im_start|>' + turn['role'] + newline }}"
    "{% if turn['content'] is string %}{{ turn['content'] }}{% else %}"
    "{% for part in turn['content'] %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>' + newline }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' + newline }}{% endif %}"
)

# Part of a message: {"type": "text", "text": …} or {"type": "image", "image": …}.
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """What the model takes.

    Attributes:
        ids: the prompt's tokens, with one image token for each token that a picture becomes.
        patches: of all pictures, (N, channels · time · height · width), or None.
        grids: rows and columns of patches of each picture.
    """

    ids: list[int]
    patches: mx.array | None = None
    grids: tuple[Grid, ...] = ()


class FiboVLMProcessor:
    """Conversations to `Inputs`.

    Attributes:
        tokenizer: transformers' tokenizer, with a chat template.
    """

    def __init__(self, tokenizer: Any, image_processor: VLImageProcessor, *, image_token: int):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self._image_token = image_token

    @classmethod
    def from_folder(cls, folder: Path, config: Qwen3VLConfig) -> FiboVLMProcessor:
        """From a model's folder.

        Raises:
            MissingExtraError: transformers is not installed.
            CheckpointError: the tokenizer is missing or damaged.
        """
        transformers = import_transformers()
        if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
            raise CheckpointError(f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.json and merges.txt")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:
            raise CheckpointError(f"the tokenizer in {folder} is damaged: {error}") from None
        if not tokenizer.chat_template:
            tokenizer.chat_template = _separate_template(folder) or CHAT_TEMPLATE
        return cls(tokenizer, image_processor(config), image_token=config.image_token_id)

    def __call__(self, messages: Sequence[Message]) -> Inputs:
        """Prepare a conversation that the model is to answer.

        Args:
            messages: turns with "role" and "content", which is text or a list of parts.

        Raises:
            ImageError: a picture is too long and narrow to be seen.
            UsageError: the text contains the token that stands for a picture.
        """
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        parts = [part for turn in messages if not isinstance(turn["content"], str) for part in turn["content"]]
        pictures = [part["image"] for part in parts if part["type"] == "image"]
        if ids.count(self._image_token) != len(pictures):
            name = self.tokenizer.decode([self._image_token])
            raise UsageError(f"the text contains {name}, which stands for a picture: leave it out")
        if not pictures:
            return Inputs(ids)
        patches, grids = self.see(pictures)
        ids = spread_image_tokens(ids, self._image_token, grids, self.image_processor.merge_size)
        return Inputs(ids, patches, tuple(grids))

    def see(self, pictures: Sequence[PIL.Image.Image]) -> tuple[mx.array, list[Grid]]:
        """The patches of several pictures, and how many rows and columns of them each has.

        Raises:
            ImageError: a picture is too long and narrow.
        """
        return self.image_processor.batch([ImageUtil.load_image(picture) for picture in pictures])


def image_processor(config: Qwen3VLConfig) -> VLImageProcessor:
    """How FIBO-VLM is shown images."""
    vision = config.vision_config
    return VLImageProcessor(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        min_pixels=MIN_PIXELS,
        max_pixels=MAX_PIXELS,
        image_mean=MEAN,
        image_std=STD,
    )


def _separate_template(folder: Path) -> str | None:
    """The chat template that older repositories keep in a file of its own, which only processors read."""
    path = folder / "chat_template.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else None

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
from mflux.models.common.tokenizers.checks import check_folder, check_prompt, check_time, library_call
from mflux.models.fibo.vlm.packages import import_transformers
from mflux.utils.image_util import ImageUtil

# How FIBO-VLM is shown pictures: shrunk or enlarged to so many pixels, values from -1 to 1.
MIN_PIXELS, MAX_PIXELS = 256 * 28 * 28, 1024 * 28 * 28
MEAN = STD = (0.5, 0.5, 0.5)

# What Qwen2-VL's conversations begin with where there is no system turn.
_USUAL_SYSTEM = "You are a helpful assistant."
# A picture is one token between two others.
_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
_MARKS = ("<|im_start|>", "<|im_end|>", _PICTURE)
# The conversations of Qwen's vision models: each turn between two marks.
_TURNS = (
    "{% for turn in messages %}"
    "{{ '<|im_start|>' + turn['role'] + newline }}"
    "{% if turn['content'] is string %}{{ turn['content'] }}{% else %}"
    "{% for part in turn['content'] %}"
    "{{ '" + _PICTURE + "' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>' + newline }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' + newline }}{% endif %}"
)
# Qwen3-VL's, and Qwen2-VL's, which repositories without a template of their own have.
_PLAIN_TEMPLATE = "{% set newline = '\\n' %}" + _TURNS
CHAT_TEMPLATE = (
    "{% set newline = '\\n' %}"
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system' + newline + '" + _USUAL_SYSTEM + "<|im_end|>' + newline }}"
    "{% endif %}" + _TURNS
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

    def __init__(self, tokenizer: Any, image_processor: VLImageProcessor, *, image_token: int, strange: bool = False):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self._image_token = image_token
        self._strange = strange

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
        strange = check_folder(folder)
        with library_call(f"the tokenizer in {folder}"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        tokenizer.chat_template = _own_template(folder, tokenizer.chat_template or _separate_template(folder))
        return cls(tokenizer, image_processor(config), image_token=config.image_token_id, strange=strange)

    def __call__(self, messages: Sequence[Message]) -> Inputs:
        """Prepare a conversation that the model is to answer.

        Args:
            messages: turns with "role" and "content", which is text or a list of parts.

        Raises:
            ImageError: a picture is too long and narrow to be seen.
            UsageError: the text contains the token that stands for a picture, or is longer than anyone needs.
        """
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        check_prompt(text)
        if self._strange:
            check_time(self.tokenizer.backend_tokenizer, text, "the tokenizer")
        with library_call("the tokenizer", "cannot read this prompt"):
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


def _own_template(folder: Path, template: object) -> str:
    """Which of the two templates here a model's own one says the same as. A template is a program, and a stranger's is
    looked at, not run: both kinds have the same marks, and one the usual system turn.

    Raises:
        CheckpointError: it is of neither kind.
    """
    if template is None:
        return CHAT_TEMPLATE
    if isinstance(template, Mapping):
        template = template.get("default")
    if not isinstance(template, str) or "<think>" in template or not all(mark in template for mark in _MARKS):
        raise CheckpointError(
            f"{folder} has a chat template that is not of Qwen2-VL's or Qwen3-VL's kind, and only these are built: "
            "take another copy of the model"
        )
    return CHAT_TEMPLATE if _USUAL_SYSTEM in template else _PLAIN_TEMPLATE


def _separate_template(folder: Path) -> str | None:
    """The chat template that older repositories keep in a file of its own, which only processors read."""
    path = folder / "chat_template.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else None

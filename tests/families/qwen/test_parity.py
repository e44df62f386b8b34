"""What of Qwen-Image the tests of all families do not see: templates, pictures as the language model is shown them."""

from __future__ import annotations

import inspect

import numpy as np
import PIL.Image
import pytest
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage,
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_plus,
)
from transformers import Qwen2VLImageProcessorPil

from mflux.errors import CheckpointError, ImageError
from mflux.models.common.networks.image_processors import VLImageProcessor
from mflux.models.common.sizes import fitted
from mflux.models.common.tokenizers.qwen import DESCRIBE, DESCRIBE_TOKENS, chat
from mflux.models.qwen.variants.edit import qwen_image_edit


def photo(width: int, height: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(100, 60), (61, 333), (28, 28), (5, 9), (1500, 20), (640, 480)])
@pytest.mark.parametrize("limits", [{}, {"min_pixels": 50_000, "max_pixels": 100_000}])
def test_pictures_become_the_reference_s_patches(size, limits):
    ours = VLImageProcessor.from_dict(limits)
    settings = {"min_pixels": ours.min_pixels, "max_pixels": ours.max_pixels}
    theirs = Qwen2VLImageProcessorPil(**settings)(images=[photo(*size)], return_tensors="np")
    patches, grid = ours(photo(*size))
    assert (1, *grid) == tuple(theirs["image_grid_thw"][0])
    assert patches.dtype == np.float32
    assert np.abs(patches - theirs["pixel_values"]).max() < 1e-5


def test_its_settings_in_both_forms():
    old = VLImageProcessor.from_dict({"min_pixels": 784, "max_pixels": 7840})
    assert VLImageProcessor.from_dict({"size": {"shortest_edge": 784, "longest_edge": 7840}}) == old
    assert VLImageProcessor.from_dict({}) == VLImageProcessor()


@pytest.mark.parametrize("values", [{"patch_size": 0}, {"resample": 2}, {"image_std": [1, 0, 1]}, {"max_pixels": 100}])
def test_settings_that_make_no_sense(values):
    with pytest.raises(CheckpointError):
        VLImageProcessor.from_dict(values)


def test_a_picture_that_is_too_long():
    with pytest.raises(ImageError, match="2010x10 is too long and narrow"):
        VLImageProcessor()(photo(2010, 10))


@pytest.mark.parametrize("size", [(100, 60), (61, 333), (1024, 1024), (4000, 3000), (7, 50)])
def test_sizes_of_edits(size):
    for area in (1024 * 1024, 384 * 384):
        for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
            expected = module.calculate_dimensions(area, size[0] / size[1])[:2]
            assert fitted(size, area, qwen_image_edit.ROUNDING) == tuple(map(int, expected))


@pytest.mark.parametrize(
    "module, name, text",
    [
        (pipeline_qwenimage, "QwenImagePipeline", chat("{}", system=DESCRIBE)),
        (
            pipeline_qwenimage_edit,
            "QwenImageEditPipeline",
            chat("<|vision_start|><|image_pad|><|vision_end|>{}", system=qwen_image_edit.SYSTEM),
        ),
        (pipeline_qwenimage_edit_plus, "QwenImageEditPlusPipeline", chat("{}", system=qwen_image_edit.SYSTEM)),
    ],
)
def test_templates_are_the_reference_s_byte_for_byte(module, name, text):
    source = inspect.getsource(getattr(module, name).__init__)
    line = next(line for line in source.splitlines() if "self.prompt_template_encode =" in line)
    theirs: dict[str, str] = {}
    exec(line.strip().replace("self.prompt_template_encode", "found"), theirs)
    assert theirs["found"] == text
    start = DESCRIBE_TOKENS if name == "QwenImagePipeline" else qwen_image_edit._TEMPLATE_TOKENS
    assert f"self.prompt_template_encode_start_idx = {start}\n" in source

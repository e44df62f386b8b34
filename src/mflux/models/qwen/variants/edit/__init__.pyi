"""Written by tools/stubs.py."""

from mflux.models.qwen.variants.edit.qwen_image_edit import QwenImageEdit as QwenImageEdit

"""Written by tools/stubs.py."""

from mflux.models.ernie_image.variants.txt2img.ernie_image import ErnieImage as ErnieImage

"""Written by tools/stubs.py."""

from mflux.models.z_image.variants.z_image import ZImage as ZImage
from mflux.models.z_image.variants.z_image import ZImageTurbo as ZImageTurbo
from mflux.models.z_image.variants.controlnet.z_image_turbo_controlnet import ZImageTurboControlnet as ZImageTurboControlnet

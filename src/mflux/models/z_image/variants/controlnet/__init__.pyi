"""Written by tools/stubs.py."""

from mflux.models.z_image.variants.controlnet.control_types import ControlSpec as ControlSpec
from mflux.models.z_image.variants.controlnet.control_types import ControlType as ControlType
from mflux.models.z_image.variants.controlnet.z_image_turbo_controlnet import ZImageTurboControlnet as ZImageTurboControlnet

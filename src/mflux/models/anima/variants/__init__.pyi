"""Written by tools/stubs.py."""

from mflux.models.anima.variants.txt2img.anima import Anima as Anima

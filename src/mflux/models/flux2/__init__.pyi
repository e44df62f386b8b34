"""Written by tools/stubs.py."""

from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein as Flux2Klein

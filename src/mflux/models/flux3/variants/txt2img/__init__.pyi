"""Written by tools/stubs.py."""

from mflux.models.flux3.variants.txt2img.flux3_klein import Flux3Klein as Flux3Klein

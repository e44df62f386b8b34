"""Written by tools/stubs.py."""

from mflux.models.ideogram4.variants.txt2img.ideogram4 import Ideogram4 as Ideogram4

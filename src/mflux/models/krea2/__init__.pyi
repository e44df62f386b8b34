"""Written by tools/stubs.py."""

from mflux.models.krea2.variants.txt2img.krea2 import Krea2 as Krea2

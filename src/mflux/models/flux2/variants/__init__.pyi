"""Written by tools/stubs.py."""

from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein as Flux2Klein
from mflux.models.flux2.variants.edit.flux2_klein_edit import Flux2KleinEdit as Flux2KleinEdit

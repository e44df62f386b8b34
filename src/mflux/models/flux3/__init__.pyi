"""Written by tools/stubs.py."""

from mflux.models.flux3.variants.txt2img.flux3_klein import Flux3Klein as Flux3Klein
from mflux.models.flux3.variants.edit.flux3_klein_edit import Flux3KleinEdit as Flux3KleinEdit

"""Written by tools/stubs.py."""

from mflux.models.fibo.variants.edit.fibo_edit import FIBOEdit as FIBOEdit

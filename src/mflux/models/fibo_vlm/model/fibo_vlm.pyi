"""Written by tools/stubs.py."""

from mflux.models.fibo.vlm.fibo_vlm import FiboVLM as FiboVLM

"""Written by tools/stubs.py."""

from mflux.models.seedvr2.variants.upscale.seedvr2 import SeedVR2 as SeedVR2

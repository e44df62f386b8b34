"""Written by tools/stubs.py."""

from mflux.models.common.controls.depth_pro.depth_pro import DepthPro as DepthPro
from mflux.models.common.controls.depth_pro.depth_pro import DepthResult as DepthResult

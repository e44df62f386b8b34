"""Z-Image's text encoder: Qwen3-4B up to its last layer but one."""

from __future__ import annotations

from mflux.models.common.networks.text_encoders.qwen3 import Qwen3TextEncoder


class ZImageTextEncoder(Qwen3TextEncoder):
    hidden_states = (-2,)
    # With the layer that no picture needs: what is saved is there for others as well.
    saved_class = Qwen3TextEncoder

"""The words that SeedVR2 was trained to upscale by, already encoded.

`pos_emb.safetensors` holds ByteDance's published `pos_emb.pt` (SeedVR2, Apache-2.0) in float16, which has the same
values. It ships with mflux, 0.6 MB, because the repository of weights has no copy of it.
"""

from __future__ import annotations

from pathlib import Path

from mflux.backend import mx
from mflux.checkpoints.readers.safetensors import SafetensorsFile


def text_embeds() -> mx.array:
    """The transformer's text: (58, 5120), float16."""
    return SafetensorsFile(Path(__file__).parent / "pos_emb.safetensors")["embedding"]

"""Qwen-Image's latents, at mflux 0.24's path."""

from __future__ import annotations

from mflux.models.common.latent_creator.patches import PatchLatentCreator


class QwenLatentCreator(PatchLatentCreator):
    """Noise for a seed is the same as in mflux 0.24: (1, height/16 · width/16, 64), float32."""

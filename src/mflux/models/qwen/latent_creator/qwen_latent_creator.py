"""Qwen-Image's latents, drawn and packed as FLUX.1's are."""

from __future__ import annotations

from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator


class QwenLatentCreator(FluxLatentCreator):
    """Noise for a seed is the same as in mflux 0.24: (1, height/16 · width/16, 64), float32."""

"""FLUX.1 with concept attention: where a given image shows a concept."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mflux.backend import mx
from mflux.models.common.latent_creator.latent_creator import LatentCreator
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.sources import needed
from mflux.models.flux.variants.concept_attention.attention_data import ConceptHeatmap
from mflux.models.flux.variants.concept_attention.flux_concept import ConceptPipeline
from mflux.utils.generated_image import GeneratedImage


class Flux1ConceptFromImage(ConceptPipeline):
    """FLUX.1 that looks at an image with the noise of each step over it; see `Model`.

    What the transformer would generate is not computed.
    """

    def generate_image(
        self,
        seed: int,
        prompt: str,
        concept: str,
        image_path: Path | str,
        num_inference_steps: int = 4,
        height: int | None = None,
        width: int | None = None,
        guidance: float = 4.0,
        image_strength: float | None = None,
        scheduler: str | None = None,
        heatmap_layer_indices: list[int] | None = None,
        heatmap_timesteps: list[int] | None = None,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Look at an image.

        Args:
            seed: of the noise, 0 to 2^64 - 1.
            prompt: what the image shows; encoded once and kept.
            image_path: the image.
            guidance: as if the image were to be generated with it.
            image_strength: the share of steps, those with the most noise, that are left out; from 0 to 1.
            concept, heatmap_layer_indices, heatmap_timesteps: as for `Flux1Concept.generate_image`.
            num_inference_steps, height, width, scheduler: likewise.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.

        Returns:
            The image as the autoencoder gives it back; `concept_heatmap` is a `ConceptHeatmap`.

        Raises:
            as `Flux1.generate_image`.
        """
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            guidance=guidance,
            image_path=needed(image_path, "image_path (--input-image-path)"),
            image_strength=image_strength or None,
            scheduler=scheduler,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )
        layers, timesteps = self.looked_at(config, concept, heatmap_layer_indices, heatmap_timesteps)

        # 1. Encode the prompt and the concept
        encoded, of_concept = self.encode_prompts(prompt, concept)

        # 2. Make the noise, and the image's latents
        noise = FluxLatentCreator.create_noise(seed, config.height, config.width)
        clean = self.encode_image(config.image_path, config.height, config.width)

        def noisy(_: mx.array, step: int) -> mx.array:
            return LatentCreator.add_noise_by_interpolation(clean, noise, config.scheduler.sigmas[step + 1])

        # 3. Look for the concept in the image with less and less noise
        velocity, stream = self.watched(config, encoded, of_concept, layers, timesteps)
        start = noisy(clean, config.init_time_step - 1)
        latents = self.denoise(config, start, velocity, seed=seed, prompt=prompt, after_step=noisy)
        heatmap = ConceptHeatmap.of(np.array(stream.heat), concept, layers, timesteps, config.height, config.width)

        # 4. Decode
        return self.make_image(config, latents, seed=seed, prompt=prompt, concept_heatmap=heatmap)

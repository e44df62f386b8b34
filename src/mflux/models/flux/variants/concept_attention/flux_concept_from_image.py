"""FLUX.1 with concept attention: where a given picture shows a concept."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mflux.backend import mx
from mflux.models.common.latent_creator.latent_creator import LatentCreator
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.sources import needed
from mflux.models.flux.variants.concept_attention.flux_concept import Flux1Concept
from mflux.utils.generated_image import GeneratedImage


class Flux1ConceptFromImage(Flux1Concept):
    """FLUX.1 schnell, dev and krea-dev that look at a picture with the noise of each step over it; see `Pipeline`.

    Source: see `ConceptStream`. What the transformer would draw is not computed.
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
        scheduler: str = "linear",
        heatmap_layer_indices: list[int] | None = None,
        heatmap_timesteps: list[int] | None = None,
    ) -> GeneratedImage:
        """Look at one picture.

        Args:
            seed: of the noise, 0 to 2^64 - 1.
            prompt: what the picture shows; encoded once and kept.
            concept: what to look for in it, a word or a few; likewise.
            image_path: the picture.
            num_inference_steps: 1 or more.
            height, width: in pixels, rounded down to multiples of 16; None for the picture's own.
            guidance: as if the picture were to be drawn with it.
            image_strength: the share of steps, those with the most noise, that are left out; from 0 to 1.
            scheduler: "linear", "flow_match_euler_discrete", or "package.module.Class".
            heatmap_layer_indices: the double blocks to look at, from 0; by default the last four.
            heatmap_timesteps: the steps to look at, counted from 0 among those that are taken; by default all.

        Returns:
            The picture as the autoencoder gives it back; `concept_heatmap` is a `ConceptHeatmap`.

        Raises:
            MfluxError: sizes, steps, picture or weights are unusable; the message says which.
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
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
        )
        heatmap = self.heatmap(config, concept, heatmap_layer_indices, heatmap_timesteps)

        # 1. Encode the prompt and the concept
        embeds, of_concept = self.encode_prompts(prompt, concept)

        # 2. Make the noise, and the picture's latents
        noise = FluxLatentCreator.create_noise(seed, config.height, config.width)
        clean = self.encode_image(config.image_path, config.height, config.width)

        def noisy(_: mx.array, step: int) -> mx.array:
            return LatentCreator.add_noise_by_interpolation(clean, noise, config.scheduler.sigmas[step + 1])

        # 3. Look for the concept in the picture with less and less noise
        velocity, stream = self.watched(config, embeds, of_concept, heatmap)
        start = noisy(clean, config.init_time_step - 1)
        latents = self.denoise(config, start, velocity, seed=seed, prompt=prompt, after_step=noisy)
        heatmap.show(np.array(stream.heat))

        # 4. Decode
        return self.picture(config, latents, seed=seed, prompt=prompt, concept_heatmap=heatmap)

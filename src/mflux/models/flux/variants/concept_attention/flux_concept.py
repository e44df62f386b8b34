"""FLUX.1 with concept attention: an image, and where it shows a concept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mflux.backend import mx
from mflux.errors import UsageError
from mflux.models.common.config.config import Config
from mflux.models.common.pipeline import Velocity
from mflux.models.common.tokenizers.checks import check_prompt
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.model.concept_attention import ConceptStream
from mflux.models.flux.pipeline import FluxPipeline, Prompt
from mflux.models.flux.variants.concept_attention.attention_data import ConceptHeatmap
from mflux.utils import values
from mflux.utils.generated_image import GeneratedImage

# Of FLUX.1's 19 double blocks the last four tell the most; of another model's as many.
_LAYERS = 4


class ConceptPipeline(FluxPipeline):
    """FLUX.1 schnell, dev and krea-dev, watched while they denoise. Source: see `ConceptStream`."""

    default_model = "schnell"
    # What was seen in a step cannot be unseen where the step has to be taken again.
    narrows = False

    def looked_at(
        self, config: Config, concept: str, layers: Sequence[int] | None, steps: Sequence[int] | None
    ) -> tuple[list[int], list[int]]:
        """The double blocks and the steps to look at, checked before any work.

        Raises:
            UsageError: there is no such block or step, or no step at all.
        """
        check_prompt(concept)
        blocks = self.configuration("transformer").num_layers
        taken = len(config.time_steps)
        if taken < 1:
            raise UsageError(
                f"a strength of {config.image_strength:g} leaves no step to look at: use a smaller image_strength "
                "(--image-strength)"
            )
        chosen = values.indices(layers, blocks, "heatmap_layer_indices (--heatmap-layer-indices)", "double blocks")
        timesteps = values.indices(steps, taken, "heatmap_timesteps (--heatmap-timesteps)", "steps that are taken")
        return chosen or list(range(max(0, blocks - _LAYERS), blocks)), timesteps or list(range(taken))

    def watched(
        self,
        config: Config,
        prompt: Prompt,
        concept: Prompt,
        layers: Sequence[int],
        timesteps: Sequence[int],
    ) -> tuple[Velocity, ConceptStream]:
        """`predictor` feeding a `ConceptStream`; returns both."""
        predict = self.predictor(config, prompt)
        guidance = mx.array([config.guidance]) if self.configuration("transformer").guidance_embeds else None
        stream = ConceptStream(
            self.own_transformer(), concept.embeds, concept.pooled, layers, self.sigmas_ahead(config), guidance
        )
        again = {number - config.init_time_step for number in self.left_out(config)}
        steps = (number for number in range(len(config.time_steps)) if number not in again)
        if again.issuperset(timesteps):
            raise UsageError(
                "the step cache leaves out every step that is looked at: name others of them (--heatmap-timesteps), or "
                "leave step_cache_ratio (--step-cache-ratio) out"
            )

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            if next(steps) not in timesteps:
                return predict(latents, sigma)
            prediction = predict(latents, sigma, watch=stream.watch(sigma[None]))
            # Now, so that nothing of this step is kept but the sum.
            mx.eval(stream.heat)
            return prediction

        return velocity, stream


class Flux1Concept(ConceptPipeline):
    """FLUX.1 that also tells where a concept is in what it generates, which is what `Flux1` generates; see `Model`."""

    def generate_image(
        self,
        seed: int,
        prompt: str,
        concept: str,
        num_inference_steps: int = 4,
        height: int | None = None,
        width: int | None = None,
        guidance: float = 4.0,
        image_path: Path | str | None = None,
        image_strength: float | None = None,
        scheduler: str | None = None,
        heatmap_layer_indices: list[int] | None = None,
        heatmap_timesteps: list[int] | None = None,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Generate one image.

        Args:
            seed, prompt, num_inference_steps, height, width, guidance: as for `Flux1.generate_image`.
            image_path, image_strength, scheduler: likewise.
            concept: what to look for in the image, a word or a few; encoded once and kept.
            heatmap_layer_indices: the double blocks to look at, from 0; by default the last four.
            heatmap_timesteps: the steps to look at, counted from 0 among those that are taken; by default all.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.

        Returns:
            The image; `concept_heatmap` is a `ConceptHeatmap`.

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
            image_path=image_path,
            image_strength=image_strength,
            scheduler=scheduler,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )
        layers, timesteps = self.looked_at(config, concept, heatmap_layer_indices, heatmap_timesteps)

        # 1. Encode the prompt and the concept
        encoded, of_concept = self.encode_prompts(prompt, concept)

        # 2. Make the latents to start from: noise, or an image with noise over it
        latents = self.start(config, FluxLatentCreator.create_noise(seed, config.height, config.width))

        # 3. Denoise, and look for the concept
        velocity, stream = self.watched(config, encoded, of_concept, layers, timesteps)
        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt)
        heatmap = ConceptHeatmap.of(np.array(stream.heat), concept, layers, timesteps, config.height, config.width)

        # 4. Decode
        return self.make_image(config, latents, seed=seed, prompt=prompt, concept_heatmap=heatmap)

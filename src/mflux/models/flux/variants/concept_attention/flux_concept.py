"""FLUX.1 with concept attention: a picture, and where it shows a concept."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np

from mflux.backend import mx
from mflux.errors import UsageError
from mflux.models.common.config.config import Config
from mflux.models.common.pipeline import Velocity
from mflux.models.common.tokenizers.checks import check_prompt
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.model.concept_attention import ConceptStream
from mflux.models.flux.variants.concept_attention.attention_data import ConceptHeatmap
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.utils import values
from mflux.utils.generated_image import GeneratedImage

# Of FLUX.1's 19 double blocks the last four tell the most; of another model's as many.
_LAYERS = 4


class Flux1Concept(Flux1):
    """FLUX.1 schnell, dev and krea-dev that also tell where a concept is in what they draw; see `Pipeline`.

    Source: see `ConceptStream`. What is drawn is what `Flux1` draws.
    """

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
        scheduler: str = "linear",
        heatmap_layer_indices: list[int] | None = None,
        heatmap_timesteps: list[int] | None = None,
    ) -> GeneratedImage:
        """Draw one picture.

        Args:
            seed: 0 to 2^64 - 1; the same seed and settings give the same picture.
            prompt: what to draw; encoded once and kept.
            concept: what to look for in it, a word or a few; likewise.
            num_inference_steps: 1 or more.
            height, width: in pixels, rounded down to multiples of 16; None for the source picture's or the model's own.
            guidance: how closely to follow the prompt; models without guidance (schnell) have no use for it.
            image_path: a picture to start from.
            image_strength: how much of it to keep: the share of steps that are left out, from 0 (nothing is kept) to 1.
            scheduler: "linear", "flow_match_euler_discrete", or "package.module.Class".
            heatmap_layer_indices: the double blocks to look at, from 0; by default the last four.
            heatmap_timesteps: the steps to look at, counted from 0 among those that are taken; by default all.

        Returns:
            The picture; `concept_heatmap` is a `ConceptHeatmap`.

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
            image_path=image_path,
            image_strength=image_strength,
            scheduler=scheduler,
        )
        heatmap = self.heatmap(config, concept, heatmap_layer_indices, heatmap_timesteps)

        # 1. Encode the prompt and the concept
        embeds, of_concept = self.encode_prompts(prompt, concept)

        # 2. Make the latents to start from: noise, or a picture with noise over it
        latents = self.start(config, FluxLatentCreator.create_noise(seed, config.height, config.width))

        # 3. Denoise, and look for the concept
        velocity, stream = self.watched(config, embeds, of_concept, heatmap)
        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt)
        heatmap.show(np.array(stream.heat))

        # 4. Decode
        return self.picture(config, latents, seed=seed, prompt=prompt, concept_heatmap=heatmap)

    def heatmap(
        self, config: Config, concept: str, layers: Sequence[int] | None, steps: Sequence[int] | None
    ) -> ConceptHeatmap:
        """What is to be found where, before any work; its picture comes with `ConceptHeatmap.show`.

        Raises:
            UsageError: there is no such block or step, or no step at all.
        """
        check_prompt(concept)
        blocks = self._transformer_settings().get("num_layers", 19)
        taken = config.num_inference_steps - config.init_time_step
        if taken < 1:
            raise UsageError(
                f"a strength of {config.image_strength:g} leaves no step to look at: use a smaller image_strength "
                "(--image-strength)"
            )
        layers = values.indices(layers, blocks, "heatmap_layer_indices (--heatmap-layer-indices)", "double blocks")
        steps = values.indices(steps, taken, "heatmap_timesteps (--heatmap-timesteps)", "steps that are taken")
        layers = layers or list(range(max(0, blocks - _LAYERS), blocks))
        return ConceptHeatmap(concept, None, layers, steps or list(range(taken)), config.height, config.width)

    def watched(
        self,
        config: Config,
        embeds: tuple[mx.array, mx.array],
        concept: tuple[mx.array, mx.array],
        wanted: ConceptHeatmap,
    ) -> tuple[Velocity, ConceptStream]:
        """`predictor` with an eye on the concept, and what it sees."""
        predict = self.predictor(config, *embeds)
        stream = ConceptStream(self.transformer, *concept, wanted.layer_indices)
        guidance = mx.array([config.guidance]) if self.transformer.config.guidance_embeds else None
        steps = count()

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            if next(steps) not in wanted.timesteps:
                return predict(latents, sigma)
            prediction = predict(latents, sigma, watch=stream.watch(sigma[None], guidance))
            # Now, so that nothing of this step is kept but the sum.
            mx.eval(stream.heat)
            return prediction

        return velocity, stream

"""Qwen-Image: text to image and image to image."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from mflux.backend import mx
from mflux.models.common.memory import LazyComponent
from mflux.models.common.networks.qwen2_5_vl import Qwen25VLTextEncoder
from mflux.models.common.pipeline import refuse_pid
from mflux.models.common.tokenizers.qwen import DESCRIBE, DESCRIBE_TOKENS, chat
from mflux.models.qwen.family import FAMILY
from mflux.models.qwen.latent_creator.qwen_latent_creator import QwenLatentCreator
from mflux.models.qwen.pipeline import NOTHING, QwenPipeline
from mflux.utils.generated_image import GeneratedImage

log = logging.getLogger(__name__)

_LONGEST = 1024


class QwenImage(QwenPipeline):
    """Qwen-Image (first release and 2512) and anything of that architecture in the diffusers layout; see `Model`."""

    components = FAMILY.components
    default_model = "qwen-image"
    divides = True
    text_encoder: LazyComponent[Qwen25VLTextEncoder]

    def generate_image(
        self,
        seed: int,
        prompt: str,
        num_inference_steps: int = 4,
        height: int | None = 1024,
        width: int | None = 1024,
        guidance: float = 4.0,
        image_path: Path | str | None = None,
        image_strength: float | None = None,
        scheduler: str | None = None,
        negative_prompt: str | None = None,
        pid_decode: bool = False,
        pid_degrade_sigma: float = 0.0,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Generate one image; arguments and errors are those of `Flux1.generate_image` but for these.

        Args:
            prompt: what the image shows; encoded once and kept. May be empty.
            guidance: how far to go away from the negative prompt; each step takes two passes above 1, one otherwise.
            scheduler: also "lightning".
            negative_prompt: what not to show; a single space if there is none.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.
        """
        refuse_pid(pid_decode, pid_degrade_sigma)
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

        # 1. Encode the prompts
        encoded = self.encode_prompts(*([prompt, negative_prompt or NOTHING] if config.guidance > 1 else [prompt]))

        # 2. Make the latents to start from: noise, or an image with noise over it
        latents = self.start(config, QwenLatentCreator.create_noise(seed, config.height, config.width))

        # 3. Denoise
        latents = self.denoise(config, latents, self.predictor(config, *encoded), seed=seed, prompt=prompt)

        # 4. Decode
        return self.make_image(config, latents, seed=seed, prompt=prompt, negative_prompt=negative_prompt)

    def encode_prompts(self, *prompts: str) -> list[mx.array]:
        """Prompt embeddings (1, L, D) of several prompts."""
        return self.remembered(prompts, self._encode, "text_encoder")

    def _encode(self, prompts: list[str]) -> Iterator[mx.array]:
        most = _LONGEST + DESCRIBE_TOKENS
        for prompt in prompts:
            text = chat(prompt, system=DESCRIBE)
            if self.tokenizers["qwen"].is_cut(text, max_length=most):
                log.warning("the prompt is longer than the %d tokens this model reads: its end is left out", _LONGEST)
            embeds = self.text_encoder(self.tokenizers["qwen"].encode(text, max_length=most))[:, DESCRIBE_TOKENS:]
            mx.eval(embeds)
            yield embeds

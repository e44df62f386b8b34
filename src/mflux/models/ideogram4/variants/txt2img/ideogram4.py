"""Ideogram 4: text to image."""

from __future__ import annotations

import logging
from typing import Any

from mflux.errors import UsageError
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.pipeline import refuse_pid
from mflux.models.ideogram4.captions import caption
from mflux.models.ideogram4.latent_creator.ideogram4_latent_creator import Ideogram4LatentCreator
from mflux.models.ideogram4.pipeline import Ideogram4Pipeline
from mflux.models.ideogram4.presets import DEFAULT, GUIDANCE, LogitNormalScheduler
from mflux.models.ideogram4.presets import preset as preset_of
from mflux.text import some
from mflux.utils.generated_image import GeneratedImage

log = logging.getLogger(__name__)


class Ideogram4(Ideogram4Pipeline):
    """Generates images; see `Ideogram4Pipeline`. Reference class: diffusers' `Ideogram4Pipeline`."""

    def __init__(
        self,
        quantize: int | None = None,
        model_path: str | None = None,
        model_config: ModelConfig | None = None,
        lora_paths: list[str] | None = None,
        lora_scales: list[float] | None = None,
        bake_lora: bool = True,
        *,
        text_encoder_paths: list[str] | None = None,
        vae_path: str | None = None,
    ):
        super().__init__(
            quantize,
            model_path,
            lora_paths,
            lora_scales,
            bake_lora,
            model_config,
            text_encoder_paths=text_encoder_paths,
            vae_path=vae_path,
        )

    def generate_image(
        self,
        seed: int,
        prompt: str | dict[str, Any],
        num_inference_steps: int | None = None,
        height: int = 1024,
        width: int = 1024,
        guidance: float | None = None,
        preset: str | None = None,
        strict_caption_validation: bool = False,
        warn_on_caption_issues: bool = True,
        cfg_end: float | None = None,
        pid_decode: bool = False,
        pid_degrade_sigma: float = 0.0,
        *,
        step_cache_ratio: float | None = None,
    ) -> GeneratedImage:
        """Generate one image; arguments and errors are those of `Flux1.generate_image` but for these.

        Args:
            prompt: a caption in JSON, as text or as a table; plain text does worse.
            num_inference_steps: None for the preset's.
            guidance: None for the preset's, which is less in the last steps, or 7 where the number of steps is not the
                preset's; 1 is the prompt's prediction alone, in half the time.
            preset: "V4_DEFAULT_20" (None), "V4_QUALITY_48" or "V4_TURBO_12": steps, guidance, noise levels.
            strict_caption_validation: whether a caption that is not as the model was taught with is refused.
            warn_on_caption_issues: whether it is told, where it is not refused.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.
        """
        refuse_pid(pid_decode, pid_degrade_sigma)
        chosen = preset_of(preset)
        prompt, problems = caption(prompt)
        if problems and strict_caption_validation:
            raise UsageError(f"the prompt is no caption as Ideogram 4 was taught with: {some(problems, each=300)}")
        if problems and warn_on_caption_issues:
            log.warning("the prompt: %s", some(problems, each=300))
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=chosen.steps if num_inference_steps is None else num_inference_steps,
            height=height,
            width=width,
            guidance=GUIDANCE if guidance is None else guidance,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )
        config.use(LogitNormalScheduler(config, chosen))
        is_preset = guidance is None and config.num_inference_steps == chosen.steps
        strengths = chosen.guidance if is_preset else (config.guidance,) * config.num_inference_steps

        # 1. Encode the prompt
        (prompt_embeds,) = self.encode_prompts(prompt)

        # 2. Make the noise to start from
        latents = self.start(config, Ideogram4LatentCreator.create_noise(seed, config.height, config.width))

        # 3. Denoise
        velocity = self.predictor(config, prompt_embeds, strengths)
        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt)

        # 4. Decode
        parameters = {"preset": preset if preset is not None and preset != DEFAULT else None}
        about = {"guidance": None} if is_preset else {}
        return self.make_image(config, latents, seed=seed, prompt=prompt, parameters=parameters, **about)

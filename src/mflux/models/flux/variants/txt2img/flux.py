"""FLUX.1: text to image and image to image."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.errors import CheckpointError
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.autoencoders.kl import AutoencoderKL
from mflux.models.common.pipeline import Pipeline, refuse_pid
from mflux.models.common.tokenizers.prompt_tokenizers import PromptTokenizer, clip_tokenizer, t5_tokenizer
from mflux.models.flux.family import FAMILY
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.model.transformer import latent_image_ids
from mflux.utils.generated_image import GeneratedImage

log = logging.getLogger(__name__)


class Flux1(Pipeline):
    """FLUX.1 schnell, dev and krea-dev, and anything of that architecture in the diffusers layout; see `Pipeline`.

    The text encoders are let go of as soon as the prompt is encoded (encoded prompts are kept in `prompt_cache`);
    transformer and autoencoder stay for the next picture.
    """

    family = FAMILY
    latent_creator = FluxLatentCreator
    default_model = "schnell"
    # Tokens of a picture are so many channels; variants add some of their own.
    in_channels = 64

    def __init__(
        self,
        quantize: int | None = None,
        model_path: str | None = None,
        lora_paths: list[str] | None = None,
        lora_scales: list[float] | None = None,
        bake_lora: bool = True,
        model_config: ModelConfig | None = None,
    ):
        super().__init__(quantize, model_path, lora_paths, lora_scales, bake_lora, model_config)
        # A name may mislead; the transformer itself knows whether it takes guidance.
        self.model_config.supports_guidance = bool(self._transformer_settings().get("guidance_embeds", True))
        self.tokenizers: Mapping[str, PromptTokenizer] = {
            "clip": clip_tokenizer(self.root / "tokenizer"),
            "t5": t5_tokenizer(self.root / "tokenizer_2"),
        }

    def _transformer_settings(self) -> dict[str, Any]:
        return self.folder_of(self.component("transformer")).config("transformer")

    def check_folder(self) -> None:
        super().check_folder()
        channels = self._transformer_settings().get("in_channels", 64)
        if channels != self.in_channels:
            # Fill takes 384, Depth and Canny take 128: what they add to the picture's own would be missing.
            raise CheckpointError(
                f"{self.root} holds a FLUX.1 transformer that takes {channels} channels a token, not "
                f"{self.in_channels}: it draws from more than a prompt, and another command draws with it"
            )
        settings = self.folder.config("vae")
        vae = AutoencoderKL.config_class.from_dict(settings, source=self.root / "vae" / "config.json")
        pixels = 2 ** (len(vae.block_out_channels) - 1)
        if (vae.latent_channels, pixels) != (16, 8):
            raise CheckpointError(
                f"{self.root} holds an autoencoder with {vae.latent_channels} latent channels for every {pixels} "
                "pixels of a side; FLUX.1's has 16 for every 8: put FLUX.1's vae folder there"
            )

    def generate_image(
        self,
        seed: int,
        prompt: str,
        num_inference_steps: int = 4,
        height: int | None = None,
        width: int | None = None,
        guidance: float = 4.0,
        image_path: Path | str | None = None,
        image_strength: float | None = None,
        scheduler: str = "linear",
        negative_prompt: str | None = None,
        pid_decode: bool = False,
        pid_degrade_sigma: float = 0.0,
    ) -> GeneratedImage:
        """Draw one picture.

        Args:
            seed: 0 to 2^64 - 1; the same seed and settings give the same picture.
            prompt: what to draw; encoded once and kept.
            num_inference_steps: 1 or more.
            height, width: in pixels, rounded down to multiples of 16; None for the source picture's or the model's own.
            guidance: how closely to follow the prompt; models without guidance (schnell) have no use for it.
            image_path: a picture to start from.
            image_strength: how much of it to keep: the share of steps that are left out, from 0 (nothing is kept) to 1.
            scheduler: "linear", "flow_match_euler_discrete", or "package.module.Class".
            negative_prompt: FLUX.1 has no use for it; a warning says so.
            pid_decode, pid_degrade_sigma: not built in this version.

        Raises:
            MfluxError: sizes, steps, picture or weights are unusable; the message says which.
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
        """
        refuse_pid(pid_decode, pid_degrade_sigma)
        if negative_prompt:
            log.warning("--negative-prompt is ignored: FLUX.1 has no negative branch")
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

        # 1. Encode the prompt
        prompt_embeds, pooled_prompt_embeds = self.encode_prompt(prompt)

        # 2. Make the latents to start from: noise, or a picture with noise over it
        latents = self.start(config, FluxLatentCreator.create_noise(seed, config.height, config.width))

        # 3. Denoise
        velocity = self.predictor(config, prompt_embeds, pooled_prompt_embeds)
        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt)

        # 4. Decode
        return self.picture(config, latents, seed=seed, prompt=prompt)

    def predictor(
        self, config: Config, prompt_embeds: mx.array, pooled_prompt_embeds: mx.array, image_ids: mx.array | None = None
    ) -> Callable[..., mx.array]:
        """The transformer with all that stays the same from step to step: called with packed latents, a noise level,
        and what else a variant tells the transformer, it gives their velocity.

        Args:
            image_ids: where the tokens are; by default those of a picture of the configuration's size.
        """
        if image_ids is None:
            image_ids = latent_image_ids(config.height // 16, config.width // 16)
        guidance = mx.array([config.guidance]) if self.transformer.config.guidance_embeds else None

        def velocity(latents: mx.array, sigma: mx.array, **more: Any) -> mx.array:
            return self.transformer(
                latents.astype(prompt_embeds.dtype),
                sigma=sigma[None],
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                image_ids=image_ids,
                guidance=guidance,
                **more,
            )

        return velocity

    def encode_prompt(self, prompt: str) -> tuple[mx.array, mx.array]:
        """T5's embeddings (1, T, D) and CLIP's pooled embedding (1, P) of a prompt, from the cache if it was seen."""
        return self.encode_prompts(prompt)[0]

    def encode_prompts(self, *prompts: str) -> list[tuple[mx.array, mx.array]]:
        """The same of several prompts, for which each encoder is loaded once."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.prompt_cache]:
            self.enter("encode")
            embeds = [self._encode_with_t5(prompt) for prompt in new]
            self.encoded("t5_text_encoder")
            pooled = [self._encode_with_clip(prompt) for prompt in new]
            self.encoded("clip_text_encoder")
            self.prompt_cache.update(zip(new, zip(embeds, pooled, strict=True), strict=True))
        return [self.prompt_cache[prompt] for prompt in prompts]

    def _encode_with_t5(self, prompt: str) -> mx.array:
        length = self.model_config.max_sequence_length
        if self.tokenizers["t5"].is_cut(prompt, max_length=length):
            log.warning("the prompt is longer than the %d tokens this model reads: its end is left out", length)
        embeds = self.t5_text_encoder(self.tokenizers["t5"](prompt, max_length=length))
        mx.eval(embeds)
        return embeds

    def _encode_with_clip(self, prompt: str) -> mx.array:
        clip = self.clip_text_encoder
        _, pooled = clip(self.tokenizers["clip"](prompt, max_length=clip.config.max_position_embeddings))
        mx.eval(pooled)
        return pooled

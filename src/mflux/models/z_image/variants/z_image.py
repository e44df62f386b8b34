"""Z-Image and Z-Image-Turbo: text to image and image to image."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.errors import CheckpointError, UsageError
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.family import Component
from mflux.models.common.networks.autoencoders.kl import AutoencoderKL
from mflux.models.common.pipeline import Pipeline, refuse_pid
from mflux.models.common.tokenizers.qwen import chat, qwen_tokenizer
from mflux.models.z_image.family import FAMILY
from mflux.models.z_image.latent_creator import ZImageLatentCreator
from mflux.models.z_image.layouts import BASE_SHIFT, TURBO_SHIFT
from mflux.utils.generated_image import GeneratedImage

log = logging.getLogger(__name__)

# What Z-Image's authors advise where nothing is said; Turbo has none.
GUIDANCE = 4.0


class ZImage(Pipeline):
    """Z-Image, Z-Image-Turbo, and anything of that architecture; see `Pipeline`.

    Args:
        model_config: `ModelConfig.z_image_turbo()` by default.
        float32: keep what passes between the transformer's layers in float32, as mflux up to 0.20 did.
        compute_precision: `mx.float16` computes attention and feed-forwards in it; such a model cannot be saved.
    """

    family = FAMILY
    latent_creator = ZImageLatentCreator
    default_model = "z-image-turbo"

    def __init__(
        self,
        quantize: int | None = None,
        model_path: str | None = None,
        lora_paths: list[str] | None = None,
        lora_scales: list[float] | None = None,
        bake_lora: bool = True,
        model_config: ModelConfig | None = None,
        float32: bool = False,
        compute_precision: mx.Dtype | None = None,
    ):
        if compute_precision is not None and compute_precision != mx.float16:
            raise UsageError(f"compute_precision is {compute_precision}: it is mx.float16 or None")
        self.float32 = float32
        self.compute_precision = compute_precision
        # With the shift of mflux 0.24; that of the checkpoint comes into `model_config`.
        self.registered = model_config or ModelConfig.from_name(self.default_model)
        super().__init__(quantize, model_path, lora_paths, lora_scales, bake_lora, self.registered)
        self.tokenizer = qwen_tokenizer(self.root / "tokenizer")

    # ---- the folder

    def check_folder(self) -> None:
        # Where no scheduler_config.json says it.
        self.folder.overrides["scheduler"] = {"shift": BASE_SHIFT if self.registered.supports_guidance else TURBO_SHIFT}
        super().check_folder()
        settings = self.folder.config("vae")
        vae = AutoencoderKL.config_class.from_dict(settings, source=self.root / "vae" / "config.json")
        channels = self.folder.config("transformer").get("in_channels", 16)
        if (vae.latent_channels, vae.spatial_factor, channels) != (16, 8, 16):
            raise CheckpointError(
                f"{self.root} holds an autoencoder with {vae.latent_channels} latent channels for every "
                f"{vae.spatial_factor} pixels of a side and a transformer that takes {channels}; Z-Image's have 16 for "
                "every 8: put the folders of one model there"
            )

    def load(self, component: Component, *, keep_dtypes: bool = False):
        module = super().load(component, keep_dtypes=keep_dtypes)
        if self.compute_precision is not None and component.stage == "denoise" and not keep_dtypes:
            module.compute_in(self.compute_precision)
        return module

    def save_model(self, base_path: str) -> None:
        if self.compute_precision is not None:
            raise UsageError("a model that computes in float16 cannot be saved: leave compute_precision out")
        super().save_model(base_path)

    # ---- a picture

    def generate_image(
        self,
        seed: int,
        prompt: str,
        num_inference_steps: int = 4,
        height: int | None = 1024,
        width: int | None = 1024,
        guidance: float | None = None,
        image_path: Path | str | None = None,
        image_strength: float | None = None,
        scheduler: str | None = None,
        negative_prompt: str | None = None,
        pid_decode: bool = False,
        pid_degrade_sigma: float = 0.0,
        *,
        cfg_normalization: float | bool = False,
        cfg_truncation: float | None = 1.0,
    ) -> GeneratedImage:
        """Draw one picture.

        Args:
            seed: 0 to 2^64 - 1; the same seed and settings give the same picture.
            prompt: what to draw; encoded once and kept.
            num_inference_steps: 1 or more; Turbo needs 8, Z-Image 28 to 50.
            height, width: in pixels, rounded down to multiples of 16; None for the source picture's or the model's own.
            guidance: how far to go beyond the prompt's prediction, away from the negative prompt's, as diffusers counts
                it: 0 is not at all, and half the time. Z-Image's default is 4; Turbo has no use for it.
            image_path: a picture to start from.
            image_strength: how much of it to keep: the share of steps that are left out, from 0 (nothing is kept) to 1.
            scheduler: None for the checkpoint's; "linear" or "flow_match_euler_discrete" for mflux 0.24's of that name,
                or "package.module.Class".
            negative_prompt: what not to draw; used with guidance.
            pid_decode, pid_degrade_sigma: not built in this version.
            cfg_normalization: how long a guided prediction may be, as a multiple of the prompt's own; False for any.
            cfg_truncation: from which time on (0 is noise, 1 the picture) guidance stops.

        Raises:
            MfluxError: sizes, steps, picture or weights are unusable; the message says which.
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
        """
        refuse_pid(pid_decode, pid_degrade_sigma)
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            guidance=self.guidance_of(guidance),
            image_path=image_path,
            image_strength=image_strength,
            scheduler=scheduler,
        )

        # 1. Encode the prompts
        prompt_embeds = self.encode_prompt(prompt)
        negative = self.encode_prompt(negative_prompt or "") if config.guidance > 0 else None
        self.encoded("text_encoder")
        if negative_prompt and negative is None:
            log.warning("the negative prompt is ignored: without guidance it has no part in the picture")

        # 2. Make the latents to start from: noise, or a picture with noise over it
        latents = self.start(config, ZImageLatentCreator.create_noise(seed, config.height, config.width))

        # 3. Denoise
        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            positive = self.predict(latents, sigma, prompt_embeds)
            stopped = cfg_truncation is not None and 1 - sigma.item() > cfg_truncation
            if negative is None or stopped:
                return -positive
            guided = positive + config.guidance * (positive - self.predict(latents, sigma, negative))
            return -limited(guided, positive, float(cfg_normalization))

        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt)

        # 4. Decode
        return self.picture(
            config,
            latents,
            seed=seed,
            prompt=prompt,
            negative_prompt=negative_prompt if negative is not None else None,
            parameters=self.parameters_of(scheduler),
        )

    def settings(self, *, scheduler: str | None, **settings: Any) -> Config:
        """As `Pipeline.settings`; a schedule that is named is mflux 0.24's, and shifts as it did."""
        config = super().settings(scheduler=scheduler or "linear", **settings)
        if scheduler is not None:
            config.model_config = self.registered
        return config

    def parameters_of(self, scheduler: str | None) -> dict[str, Any]:
        """Settings for the picture that not every family has."""
        return {
            "scheduler": scheduler,
            "float32": self.float32,
            "compute_precision": "float16" if self.compute_precision is not None else None,
        }

    def guidance_of(self, asked: float | None) -> float:
        """What is taken for it: Turbo was made without."""
        if self.registered.supports_guidance:
            return GUIDANCE if asked is None else asked
        if asked:
            log.warning("guidance is ignored: Z-Image-Turbo was made without")
        return 0.0

    def inputs(self, sigma: mx.array, prompt_embeds: mx.array) -> tuple[mx.Dtype, mx.array]:
        """What the transformer takes its latents in, and its time (1,)."""
        return mx.float32 if self.float32 else prompt_embeds.dtype, ((1000 - 1000 * sigma) / 1000)[None]

    def predict(self, latents: mx.array, sigma: mx.array, prompt_embeds: mx.array, **more: Any) -> mx.array:
        """The transformer's prediction picture - noise, float32."""
        dtype, timestep = self.inputs(sigma, prompt_embeds)
        prediction = self.transformer(latents.astype(dtype), timestep=timestep, prompt_embeds=prompt_embeds, **more)
        return prediction.astype(mx.float32)

    def encode_prompt(self, prompt: str) -> mx.array:
        """The text encoder's (1, T, D), from the cache if the prompt was seen: T is as many tokens as it has, the chat
        template's included, and 512 at most."""
        if prompt not in self.prompt_cache:
            self.enter("encode")
            length = self.model_config.max_sequence_length
            text = chat(prompt)
            if self.tokenizer.is_cut(text, max_length=length):
                log.warning("the prompt is longer than the %d tokens this model reads: its end is left out", length)
            ids, mask = self.tokenizer([text], max_length=length, pad_to_longest=True)
            (prompt_embeds,) = self.text_encoder(ids, mask)
            mx.eval(prompt_embeds)
            self.prompt_cache[prompt] = prompt_embeds
        return self.prompt_cache[prompt]


def limited(guided: mx.array, positive: mx.array, factor: float) -> mx.array:
    """A guided prediction (1, C, H, W), no longer than `factor` times the prompt's own; 0 is no limit."""
    if not factor:
        return guided
    longest = factor * mx.linalg.norm(positive.reshape(-1))
    length = mx.linalg.norm(guided.reshape(-1))
    return guided * mx.where(length > longest, longest / length, 1.0)


# mflux 0.24's second name for the class.
ZImageTurbo = ZImage

"""Qwen-Image: text to image and image to image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from mflux.backend import mx
from mflux.errors import CheckpointError
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.pipeline import Pipeline, refuse_pid
from mflux.models.common.tokenizers.qwen import chat, qwen_tokenizer
from mflux.models.qwen.family import FAMILY
from mflux.models.qwen.latent_creator.qwen_latent_creator import QwenLatentCreator
from mflux.models.qwen.model.transformer import Grid
from mflux.utils.generated_image import GeneratedImage

log = logging.getLogger(__name__)

# The model was trained with exactly this before each prompt; so many tokens of what comes out are the template's.
SYSTEM = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
_TEMPLATE_TOKENS = 34
_LONGEST = 1024
# What is taken where nothing is said against which to guide.
NOTHING = " "


class QwenBase(Pipeline):
    """What drawing and editing have in common."""

    family = FAMILY
    components = ()
    latent_creator = QwenLatentCreator

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
        self.model_config.supports_guidance = True
        self.tokenizer = qwen_tokenizer(self.root / "tokenizer")

    def check_folder(self) -> None:
        super().check_folder()
        channels = self.folder.config("transformer").get("in_channels", 64)
        vae = self.configuration("vae")
        depth, levels = vae.z_dim, len(vae.dim_mult)
        if (channels, depth, levels) != (64, 16, 4):
            raise CheckpointError(
                f"{self.root} holds a transformer of {channels} channels a token and an autoencoder of {depth} for "
                f"every {2 ** (levels - 1)} pixels; Qwen-Image's have 64, and 16 for every 8"
            )

    def velocity(
        self,
        latents: mx.array,
        sigma: mx.array,
        embeds: tuple[mx.array, mx.array | None],
        guidance: float,
        grids: Sequence[Grid],
    ) -> mx.array:
        """The velocity of the first picture's latents, guided away from the negative prompt if there is one."""
        positive, negative = embeds
        drawn = grids[0][0] * grids[0][1]

        def predict(prompt_embeds: mx.array) -> mx.array:
            # Several pictures in one sequence: what comes after the first is what an edit starts from.
            x = latents.astype(prompt_embeds.dtype)
            noise = self.transformer(x, sigma=sigma[None], prompt_embeds=prompt_embeds, grids=grids)
            return noise[:, :drawn].astype(mx.float32)

        if negative is None:
            return predict(positive)
        return self.compute_guided_noise(predict(positive), predict(negative), guidance)

    @staticmethod
    def compute_guided_noise(noise: mx.array, noise_negative: mx.array, guidance: float) -> mx.array:
        """Away from the negative prediction by `guidance`, each token as long as the positive one had it.

        Args:
            noise, noise_negative: predictions (B, L, C).
            guidance: 1 gives `noise` back.
        """
        guided = noise_negative + guidance * (noise - noise_negative)
        length = mx.linalg.norm(guided, axis=-1, keepdims=True)
        return guided * (mx.linalg.norm(noise, axis=-1, keepdims=True) / mx.maximum(length, 1e-12))


class QwenImage(QwenBase):
    """Qwen-Image (its first release and 2512) and anything of that architecture in the diffusers layout; see
    `Pipeline`.

    The text encoder is let go of as soon as the prompts are encoded (they are kept in `prompt_cache`); transformer and
    autoencoder stay for the next picture.
    """

    components = FAMILY.components
    default_model = "qwen-image"

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
        scheduler: str = "linear",
        negative_prompt: str | None = None,
        pid_decode: bool = False,
        pid_degrade_sigma: float = 0.0,
    ) -> GeneratedImage:
        """Draw one picture.

        Args:
            seed: 0 to 2^64 - 1; the same seed and settings give the same picture.
            prompt: what to draw; encoded once and kept. An empty one is drawn as well.
            num_inference_steps: 1 or more.
            height, width: in pixels, rounded down to multiples of 16; None for the source picture's or the model's own.
            guidance: how far to go away from the negative prompt; each step takes two passes above 1, one otherwise.
            image_path: a picture to start from.
            image_strength: how much of it to keep: the share of steps that are left out, from 0 (nothing is kept) to 1.
            scheduler: "linear", "flow_match_euler_discrete", "lightning", or "package.module.Class".
            negative_prompt: what not to draw; a single space if nothing is said.
            pid_decode, pid_degrade_sigma: not built in this version.

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
            guidance=guidance,
            image_path=image_path,
            image_strength=image_strength,
            scheduler=scheduler,
        )

        # 1. Encode the prompts
        prompts = [prompt, negative_prompt or NOTHING] if config.guidance > 1 else [prompt]
        positive, *negative = self.encode_prompts(prompts)
        embeds = positive, negative[0] if negative else None

        # 2. Make the latents to start from: noise, or a picture with noise over it
        latents = self.start(config, QwenLatentCreator.create_noise(seed, config.height, config.width))

        # 3. Denoise
        grids = [(config.height // 16, config.width // 16)]

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            return self.velocity(latents, sigma, embeds, config.guidance, grids)

        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt)

        # 4. Decode
        return self.picture(config, latents, seed=seed, prompt=prompt, negative_prompt=negative_prompt)

    def encode_prompts(self, prompts: Sequence[str]) -> list[mx.array]:
        """Prompt embeddings (1, L, D) of several prompts, from the cache where they were seen."""
        if any(prompt not in self.prompt_cache for prompt in prompts):
            self.enter("encode")
            for prompt in prompts:
                text, most = chat(prompt, system=SYSTEM), _LONGEST + _TEMPLATE_TOKENS
                if self.tokenizer.is_cut(text, max_length=most):
                    log.warning(
                        "the prompt is longer than the %d tokens this model reads: its end is left out", _LONGEST
                    )
                embeds = self.text_encoder(self.tokenizer.encode(text, max_length=most))[:, _TEMPLATE_TOKENS:]
                mx.eval(embeds)
                self.prompt_cache[prompt] = embeds
            self.encoded("text_encoder")
        return [self.prompt_cache[prompt] for prompt in prompts]

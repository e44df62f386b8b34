"""What FLUX.1 and its variants share: the check of a folder, encoded prompts, and a step's prediction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mflux.backend import mx
from mflux.errors import CheckpointError
from mflux.models.common.config.config import Config
from mflux.models.common.memory import LazyComponent
from mflux.models.common.networks.autoencoders.kl import AutoencoderKL
from mflux.models.common.networks.once import Once
from mflux.models.common.networks.text_encoders.clip import CLIPTextEncoder
from mflux.models.common.networks.text_encoders.t5 import T5Encoder
from mflux.models.common.pipeline import Pipeline
from mflux.models.common.tokenizers.prompt_tokenizers import PromptTokenizer, clip_tokenizer, t5_tokenizer
from mflux.models.flux.family import FAMILY
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.model.transformer import FluxTransformer, latent_image_ids
from mflux.text import shown

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt.

    Attributes:
        embeds: T5's, (1, T, D).
        pooled: CLIP's, (1, P).
    """

    embeds: mx.array
    pooled: mx.array

    @property
    def digest(self) -> tuple[object, ...]:
        """What tells its pooled embedding from others'."""
        return (str(self.pooled.dtype), *self.pooled.astype(mx.float32).flatten().tolist())  # type: ignore[misc]


class FluxPipeline(Pipeline):
    """Base of the classes of FLUX.1; see `Model` for the arguments.

    The text encoders are released as soon as the prompt is encoded (encoded prompts are kept in `prompt_cache`);
    transformer and autoencoder stay for the next image.

    Attributes:
        in_channels: channels of a token: the image's 64, and what a variant adds.
    """

    family = FAMILY
    latent_creator = FluxLatentCreator
    latents = (16, 8, None)
    in_channels = 64
    clip_text_encoder: LazyComponent[CLIPTextEncoder]
    t5_text_encoder: LazyComponent[T5Encoder]
    transformer: LazyComponent[FluxTransformer]
    vae: LazyComponent[AutoencoderKL]

    def opened(self) -> None:
        # A name may mislead; the transformer itself knows whether it takes guidance.
        self.model_config.supports_guidance = bool(self.transformer_settings().get("guidance_embeds", True))
        self.tokenizers: Mapping[str, PromptTokenizer] = {
            "clip": clip_tokenizer(self.root / "tokenizer"),
            "t5": t5_tokenizer(self.root / "tokenizer_2"),
        }

    def check_folder(self) -> None:
        super().check_folder()
        channels = self.transformer_settings().get("in_channels", 64)
        if channels != self.in_channels:
            # Fill takes 384, Depth and Canny take 128: what they add to the image's own would be missing.
            raise CheckpointError(
                f"{self.root} holds a FLUX.1 transformer that takes {shown(channels, 60)} channels a token, not "
                f"{self.in_channels}: it draws from more than a prompt, and another command draws with it"
            )

    def encode_prompts(self, *prompts: str) -> list[Prompt]:
        """Encode prompts, each encoder being loaded once for all of them."""
        return self.remembered(prompts, self._encode, "clip_text_encoder")

    def _encode(self, prompts: list[str]) -> Iterator[Prompt]:
        embeds = [self._encode_with_t5(prompt) for prompt in prompts]
        self.release_encoders("t5_text_encoder")
        for prompt, states in zip(prompts, embeds, strict=True):
            yield Prompt(states, self._encode_with_clip(prompt))

    def _encode_with_t5(self, prompt: str) -> mx.array:
        length = self.longest_prompt
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

    def predictor(
        self, config: Config, prompt: Prompt, *, image_ids: mx.array | None = None
    ) -> Callable[..., mx.array]:
        """The velocity of packed latents at a noise level, and with what else a variant passes to the transformer.

        Args:
            image_ids: where the tokens are; by default those of an image of the configuration's size.
        """
        if image_ids is None:
            image_ids = latent_image_ids(config.height // 16, config.width // 16)
        guidance = mx.array([config.guidance]) if self.model_config.supports_guidance else None
        # Loads it before the loop, whose bar counts steps.
        known = self.ahead(
            config,
            "transformer",
            lambda transformer, sigma: transformer.time_text_embed(sigma[None], guidance, prompt.pooled),
            of=(config.guidance, prompt.digest),
        )

        once = Once()

        def velocity(latents: mx.array, sigma: mx.array, **more: Any) -> mx.array:
            return self.predicting(config)(
                latents.astype(prompt.embeds.dtype),
                sigma=sigma.reshape(-1),
                prompt_embeds=prompt.embeds,
                pooled_prompt_embeds=prompt.pooled,
                image_ids=image_ids,
                guidance=guidance,
                known=known(sigma),
                once=once,
                **more,
            )

        return velocity

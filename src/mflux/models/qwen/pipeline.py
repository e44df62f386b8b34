"""What generating and editing with Qwen-Image share: guidance, and a step's prediction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from mflux.backend import mx
from mflux.models.common.config.config import Config
from mflux.models.common.family import Component
from mflux.models.common.memory import LazyComponent
from mflux.models.common.networks.autoencoders.wan import AutoencoderWan
from mflux.models.common.networks.once import Once
from mflux.models.common.pipeline import Pipeline, Velocity
from mflux.models.common.tokenizers.qwen import qwen_tokenizer
from mflux.models.qwen.family import FAMILY
from mflux.models.qwen.latent_creator.qwen_latent_creator import QwenLatentCreator
from mflux.models.qwen.model.transformer import Grid, QwenTransformer

# What is guided away from where no negative prompt is given.
NOTHING = " "


class QwenPipeline(Pipeline):
    """Base of Qwen-Image's classes; see `Model` for the arguments.

    The text encoder is released as soon as the prompts are encoded (they are kept in `prompt_cache`); transformer and
    autoencoder stay for the next image.
    """

    family = FAMILY
    negative_above = 1.0
    components: ClassVar[tuple[Component, ...]] = ()
    latent_creator = QwenLatentCreator
    latents = (16, 8, 64)
    transformer: LazyComponent[QwenTransformer]
    vae: LazyComponent[AutoencoderWan]

    def opened(self) -> None:
        self.model_config.supports_guidance = True
        self.tokenizers = {"qwen": qwen_tokenizer(self.root / "tokenizer")}

    def predictor(
        self,
        config: Config,
        positive: mx.array,
        negative: mx.array | None = None,
        *,
        sources: Sequence[mx.array] = (),
        source_grids: Sequence[Grid] = (),
    ) -> Velocity:
        """The velocity of latents at a noise level, guided away from the negative prompt if there is one.

        Args:
            positive, negative: encoded prompts (1, L, D).
            sources: tokens of the images that an edit starts from, (1, S, 64) each.
            source_grids: rows and columns of each of them.
        """
        grids = [(config.height // 16, config.width // 16), *source_grids]
        generated = grids[0][0] * grids[0][1]
        # Sources are pictures without noise to some, see `QwenTransformerConfig.zero_cond_t`.
        known = self.ahead(
            config,
            "transformer",
            lambda transformer, sigma: transformer.condition(sigma[None], positive.dtype),
            of=positive.dtype,
            zero=getattr(getattr(self.transformer, "config", None), "zero_cond_t", False),
        )

        once = Once()

        def predict(tokens: mx.array, sigma: mx.array, prompt_embeds: mx.array) -> mx.array:
            x = tokens.astype(prompt_embeds.dtype)
            noise = self.predicting(config)(
                x, sigma=sigma.reshape(-1), prompt_embeds=prompt_embeds, grids=grids, known=known(sigma), once=once
            )
            return noise[:, :generated].astype(mx.float32)

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            # Several images in one sequence: what comes after the first is what an edit starts from.
            tokens = mx.concatenate([latents, *sources], axis=1)
            if negative is None or not config.guides(sigma):
                return predict(tokens, sigma, positive)
            both = self.both(partial(predict, tokens, sigma, positive), partial(predict, tokens, sigma, negative))
            return self.compute_guided_noise(*both, config.guidance)

        return velocity

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

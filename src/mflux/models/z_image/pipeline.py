"""What Z-Image and its ControlNet share: a folder in either layout, prompts, and a step's prediction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mflux.backend import mx, nn
from mflux.errors import UsageError
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.memory import LazyComponent
from mflux.models.common.networks.autoencoders.kl import AutoencoderKL
from mflux.models.common.networks.modulation import Known
from mflux.models.common.networks.once import Once
from mflux.models.common.pipeline import Pipeline, Velocity
from mflux.models.common.replaced import called, refuse_more
from mflux.models.common.tokenizers.qwen import chat, qwen_tokenizer
from mflux.models.z_image.family import FAMILY
from mflux.models.z_image.latent_creator import ZImageLatentCreator
from mflux.models.z_image.layouts import BASE_SHIFT, TURBO_SHIFT
from mflux.models.z_image.model.text_encoder import ZImageTextEncoder
from mflux.models.z_image.model.transformer import ZImageTransformer

log = logging.getLogger(__name__)

# What Z-Image's authors advise where nothing is said; Turbo has none.
GUIDANCE = 4.0


class ZImagePipeline(Pipeline):
    """Base of Z-Image's classes; see `Model` for the arguments that all models have.

    Args:
        model_config: `ModelConfig.z_image_turbo()` by default.
        float32: keep what passes between the transformer's layers in float32, as mflux up to 0.20 did.
        compute_precision: `mx.float16` computes attention and feed-forwards in it; such a model cannot be saved.
    """

    family = FAMILY
    latent_creator = ZImageLatentCreator
    default_model = "z-image-turbo"
    negative_above = 0.0
    latents = (16, 8, 16)
    text_encoder: LazyComponent[ZImageTextEncoder]
    transformer: LazyComponent[ZImageTransformer]
    vae: LazyComponent[AutoencoderKL]
    float32 = False

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
        *,
        text_encoder_paths: list[str] | None = None,
        vae_path: str | None = None,
    ):
        self.float32 = float32
        super().__init__(
            quantize,
            model_path,
            lora_paths,
            lora_scales,
            bake_lora,
            model_config,
            text_encoder_paths=text_encoder_paths,
            vae_path=vae_path,
            compute_precision=compute_precision,
        )

    def opened(self) -> None:
        self.tokenizers = {"z_image": qwen_tokenizer(self.root / "tokenizer")}

    # ---- the folder

    def check_folder(self) -> None:
        # Where no scheduler_config.json says it.
        self.folder.overrides["scheduler"] = {"shift": BASE_SHIFT if self.registered.supports_guidance else TURBO_SHIFT}
        super().check_folder()

    def save_model(self, base_path: str) -> None:
        if self.compute_precision is not None and self.compute_precision == mx.float16:
            raise UsageError("a model that computes in float16 cannot be saved: leave compute_precision out")
        super().save_model(base_path)

    def settings(self, *, scheduler: str | None = None, **settings: Any) -> Config:
        """As `Pipeline.settings`; a schedule that is named is mflux 0.24's, and shifts as it did."""
        config = super().settings(scheduler=scheduler, **settings)
        if scheduler is not None:
            config.model_config = self.registered
        return config

    def parameters_of(self, scheduler: str | None) -> dict[str, Any]:
        """Settings for the image that not every family has."""
        return {
            "scheduler": scheduler,
            "float32": self.float32,
        }

    def guidance_of(self, asked: float | None) -> float:
        """What is taken for it: Turbo was made without."""
        if self.registered.supports_guidance:
            return GUIDANCE if asked is None else asked
        return 0.0

    def inputs(self, sigma: mx.array, prompt_embeds: mx.array) -> tuple[mx.Dtype, mx.array]:
        """What the transformer takes its latents in, and its time (1,)."""
        return mx.float32 if self.float32 else prompt_embeds.dtype, ((1000 - 1000 * sigma) / 1000).reshape(-1)

    def encode_prompts(self, *prompts: str) -> list[mx.array]:
        """The text encoder's (1, T, D) of several prompts: T is as many tokens as each has, the chat template's
        included, and 512 at most."""
        return self.remembered(prompts, self._encode, "text_encoder")

    def _encode(self, prompts: list[str]) -> Iterator[mx.array]:
        length = self.longest_prompt
        for prompt in prompts:
            text = chat(prompt)
            if self.tokenizers["z_image"].is_cut(text, max_length=length):
                log.warning("the prompt is longer than the %d tokens this model reads: its end is left out", length)
            ids, mask = self.tokenizers["z_image"]([text], max_length=length, pad_to_longest=True)
            (prompt_embeds,) = self.text_encoder(ids, mask)
            mx.eval(prompt_embeds)
            yield prompt_embeds

    def predictor(
        self,
        config: Config,
        positive: mx.array,
        negative: mx.array | None = None,
        *,
        hints: Callable[[mx.array, mx.array, Known | None, Once], dict[int, mx.array]] | None = None,
        controlnet: nn.Module | None = None,
        normalization: float = 0.0,
        truncation: float | None = None,
    ) -> Velocity:
        """The velocity of latents at a noise level, guided away from the negative prompt if there is one.

        Args:
            positive, negative: encoded prompts (1, T, D).
            hints: gives what a ControlNet adds after layers of the transformer, by their numbers; called with latents,
                noise level, and what the transformer takes as `known` and `once`.
            controlnet: the one that gives them.
            normalization: how long a guided prediction may be, as a multiple of the prompt's own; 0 is no limit.
            truncation: from which time on (0 is noise, 1 the image) guidance stops.
        """

        if self._predict is not ZImagePipeline._predict:
            refuse_more("Z-Image's step", hints=hints, normalization=normalization or None)
            return self._replaced_step(config, positive, negative, truncation)

        def condition(transformer: ZImageTransformer, sigma: mx.array) -> mx.array:
            dtype, timestep = self.inputs(sigma, positive)
            return transformer.embed_time(timestep, dtype)

        beside = () if controlnet is None else (controlnet,)
        known = self.ahead(config, "transformer", condition, *beside, of=self.inputs(mx.array(0.0), positive)[0])

        once = Once()

        def predict(latents: mx.array, sigma: mx.array, prompt_embeds: mx.array) -> mx.array:
            dtype, timestep = self.inputs(sigma, prompt_embeds)
            more = {} if hints is None else {"hints": hints(latents, sigma, known(sigma), once)}
            # The transformer predicts image - noise.
            return self.predicting(config)(
                latents.astype(dtype),
                timestep=timestep,
                prompt_embeds=prompt_embeds,
                known=known(sigma),
                once=once,
                **more,
            ).astype(mx.float32)

        def velocity(packed: mx.array, sigma: mx.array) -> mx.array:
            latents = ZImageLatentCreator.unpack_latents(packed)
            of = partial(predict, latents, sigma)
            if negative is not None and config.guides(sigma) and not is_past(sigma, truncation):
                towards, away = self.both(partial(of, positive), partial(of, negative))
                towards = limited(towards + config.guidance * (towards - away), towards, normalization)
            else:
                towards = of(positive)
            return -ZImageLatentCreator.pack_latents(towards)

        return velocity

    @staticmethod
    def _predict(transformer: Callable[..., mx.array]) -> Callable[..., mx.array]:
        """mflux 0.24's name for what makes the function of a step. A program may put another in its place, which is
        used then; this one is for what goes on with it.

        Args:
            transformer: takes mflux 0.24's keywords, as `ZImageTransformer` does.
        """

        def predict(
            latents: mx.array,
            timestep: mx.array,
            sigmas: mx.array,
            text_encodings: mx.array,
            negative_encodings: mx.array | None,
            guidance: float,
        ) -> mx.array:
            towards = transformer(x=latents, timestep=timestep, sigmas=sigmas, cap_feats=text_encodings)
            if negative_encodings is None:
                return towards
            away = transformer(x=latents, timestep=timestep, sigmas=sigmas, cap_feats=negative_encodings)
            return towards + guidance * (towards - away)

        return predict

    def _replaced_step(
        self, config: Config, positive: mx.array, negative: mx.array | None, truncation: float | None
    ) -> Velocity:
        step: Callable[..., mx.array] | None = None

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            nonlocal step
            if step is None:
                step = called("_predict", called("_predict", self._predict)(self.transformer))
            is_guided = negative is not None and config.guides(sigma) and not is_past(sigma, truncation)
            away = negative[0] if negative is not None and is_guided else None
            dtype, timestep = self.inputs(sigma, positive)
            return step(
                latents=latents.astype(dtype),
                timestep=timestep,
                sigmas=config.scheduler.sigmas,
                text_encodings=positive[0],
                negative_encodings=away,
                guidance=config.guidance,
            )

        return velocity


def is_past(sigma: mx.array, truncation: float | None) -> bool:
    """Whether a noise level is behind the time at which guidance stops."""
    return truncation is not None and 1 - float(sigma) > truncation


def limited(guided: mx.array, positive: mx.array, factor: float) -> mx.array:
    """A guided prediction (1, C, H, W), no longer than `factor` times the prompt's own; 0 is no limit."""
    if not factor:
        return guided
    longest = factor * mx.linalg.norm(positive.reshape(-1))
    length = mx.linalg.norm(guided.reshape(-1))
    return guided * mx.where(length > longest, longest / length, 1.0)

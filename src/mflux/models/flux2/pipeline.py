"""What generating and editing with FLUX.2 klein share: its parts, its prompts, and a step's prediction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from mflux.backend import mx, nn
from mflux.checkpoints.loading import load_component
from mflux.errors import UsageError
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig, key_of
from mflux.models.common.family import Component
from mflux.models.common.latent_creator.tokens import SIDE
from mflux.models.common.memory import LazyComponent
from mflux.models.common.networks.autoencoders.flux2 import AutoencoderKLFlux2
from mflux.models.common.networks.modulation import Known
from mflux.models.common.networks.once import Once
from mflux.models.common.pipeline import Pipeline, Velocity
from mflux.models.common.replaced import called, refuse_more
from mflux.models.common.tokenizers.qwen import chat, qwen_tokenizer
from mflux.models.flux2 import small_parts
from mflux.models.flux2.distilled import is_distilled, keeps_references
from mflux.models.flux2.family import FAMILY
from mflux.models.flux2.latent_creator.flux2_latent_creator import CHANNELS, Flux2LatentCreator
from mflux.models.flux2.model.text_encoder import KleinTextEncoder, SmallTextEncoder
from mflux.models.flux2.model.transformer import Flux2Transformer, KeysValues, grid_ids, text_ids

log = logging.getLogger(__name__)

# Tokens of a prompt; it is padded to so many, and padding counts as text.
LENGTH = 512


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt: (1, T, D), and the place of its first token in the text."""

    embeds: mx.array
    start: int = 0

    @property
    def ids(self) -> mx.array:
        return text_ids(self.embeds.shape[1], self.start)


class KleinPipeline(Pipeline):
    """Base of FLUX.2 klein's classes; see `Model` for the arguments that all models have.

    The text encoder is released as soon as the prompts are encoded (they are kept in `prompt_cache`); transformer and
    autoencoder stay for the next image.

    Args:
        compute_precision: as for every model.
        small_text_encoder: Qwen3-0.6B with an adapter in the place of Qwen3-4B; for the 4B models.
        small_decoder: Black Forest Labs' smaller decoder in the place of the autoencoder's own.

    Raises:
        UsageError: another precision, or a small text encoder for a 9B model.
    """

    family = FAMILY
    latent_creator = Flux2LatentCreator
    default_model = "flux2-klein-4b"
    latents = (CHANNELS, SIDE, CHANNELS)
    schedule = "flow_match_euler_discrete"
    text_encoder: LazyComponent[KleinTextEncoder]
    transformer: LazyComponent[Flux2Transformer]
    vae: LazyComponent[AutoencoderKLFlux2]
    small_text_encoder = False
    small_decoder = False

    def __init__(
        self,
        quantize: int | None = None,
        model_path: str | None = None,
        lora_paths: list[str] | None = None,
        lora_scales: list[float] | None = None,
        bake_lora: bool = True,
        model_config: ModelConfig | None = None,
        compute_precision: mx.Dtype | None = None,
        small_text_encoder: bool = False,
        small_decoder: bool = False,
        *,
        text_encoder_paths: list[str] | None = None,
        vae_path: str | None = None,
    ):
        self.small_text_encoder = small_text_encoder
        self.small_decoder = small_decoder
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
        if self.small_text_encoder:
            self._small_encoder = small_parts.text_encoder_folders()
        if self.small_decoder:
            self._small_decoder = small_parts.decoder_folder()
        self.tokenizers = {"qwen3": qwen_tokenizer(self.root / "tokenizer")}

    @cached_property
    def is_distilled(self) -> bool:
        """Whether guidance is in the model already."""
        key = key_of(self.model_config.model_name, self.model_config.base_model)
        return is_distilled(self.folder_root, key)

    @cached_property
    def keeps_references(self) -> bool:
        """Whether the model was trained to find what it needs of references where the first step left it."""
        return keeps_references(self.folder_root, self.model_config.supports_kv_cache)

    def encoded_from(self) -> list[Path]:
        return [*super().encoded_from(), *(self._small_encoder if self.small_text_encoder else ())]

    def own_components(self) -> list[Component]:
        own = super().own_components()
        return [part for part in own if not (self.small_text_encoder and part.name == "text_encoder")]

    def check_folder(self) -> None:
        super().check_folder()
        width = self.transformer_settings().get("joint_attention_dim", small_parts.PROMPT_EMBEDS)
        if self.small_text_encoder and width != small_parts.PROMPT_EMBEDS:
            raise UsageError(
                "--small-text-encoder takes the place of Qwen3-4B, and this model reads another encoder: leave it "
                "out, or use flux2-klein-4b or flux2-klein-base-4b"
            )

    def load(self, component: Component, *, keep_dtypes: bool = False) -> nn.Module:
        if component.name == "text_encoder" and self.small_text_encoder:
            return small_parts.load_text_encoder(*self._small_encoder, quantize=self._quantize)
        if component.name == "vae" and self.small_decoder:
            folder = self.folder_of(component)
            own = folder.config("vae"), folder.tensors("vae")
            config, tensors = small_parts.with_small_decoder(self._small_decoder, *own)
            dtype = mx.float32 if self.vae_full_precision else None
            return load_component(
                AutoencoderKLFlux2, self.root / "vae", dtype=dtype, quantize=self._quantize, config=config,
                tensors=tensors,
            )  # fmt: skip
        return super().load(component, keep_dtypes=keep_dtypes)

    def save_model(self, base_path: str) -> None:
        if self.small_text_encoder or self.small_decoder:
            option = "small_text_encoder" if self.small_text_encoder else "small_decoder"
            raise UsageError(f"a model with {option} is not saved, since it would load as another: leave {option} out")
        super().save_model(base_path)

    # ---- the stages of a picture

    def prompts_of(self, prompt: str, guidance: float) -> list[str]:
        """The prompt, and where guidance needs one, the empty prompt to be guided away from."""
        if guidance > 1 and self.is_distilled:
            log.warning("guidance %g is ignored: this model was distilled, and has it already", guidance)
            guidance = 1.0
        return [prompt, ""] if guidance > 1 else [prompt]

    def is_guided(self, guidance: float | None) -> bool:
        return guidance is not None and guidance > 1 and not self.is_distilled

    def encode_prompts(self, *prompts: str) -> list[Prompt]:
        """Encode prompts, the text encoder being loaded once for all of them."""
        return self.remembered(prompts, self._encode, "text_encoder")

    def _encode(self, prompts: list[str]) -> Iterator[Prompt]:
        encoder: KleinTextEncoder | SmallTextEncoder = self.text_encoder
        length, start = (encoder.max_length, encoder.left_out) if isinstance(encoder, SmallTextEncoder) else (LENGTH, 0)
        for prompt in prompts:
            text = chat(prompt, think=False)
            if self.tokenizers["qwen3"].is_cut(text, max_length=length):
                log.warning("the prompt is longer than the %d tokens this model reads: its end is left out", length)
            embeds = encoder(*self.tokenizers["qwen3"]([text], max_length=length))
            mx.eval(embeds)
            yield Prompt(embeds, start)

    def predictor(
        self,
        config: Config,
        prompt: Prompt,
        negative: Prompt | None = None,
        *,
        beside: tuple[mx.array, mx.array] | None = None,
        references: list[KeysValues] | None = None,
    ) -> Velocity:
        """The velocity of latents at a noise level, without classifier-free guidance or with it
        (arxiv.org/abs/2207.12598).

        Args:
            prompt, negative: see `encode_prompts`; the configuration's guidance says how far to go from the negative
                prompt to the prompt, 1 being the prompt.
            beside: tokens of references (1, R, 128) and their positions (R, 4), which take part in each step.
            references: what is kept of references that do not.
        """
        rows, columns = config.height // SIDE, config.width // SIDE
        image_ids = grid_ids(rows, columns)
        if beside is not None:
            image_ids = mx.concatenate([image_ids, beside[1]])

        if self._predict is not KleinPipeline._predict:
            refuse_more("FLUX.2's step", references=references)
            return self._replaced_step(config, prompt, negative, beside)

        known, once = self.known(config, prompt, zero=references is not None), Once()

        def predict(tokens: mx.array, sigma: mx.array, prompt: Prompt) -> mx.array:
            return self.predicting(config)(
                tokens.astype(prompt.embeds.dtype),
                sigma=sigma.reshape(-1),
                prompt_embeds=prompt.embeds,
                image_ids=image_ids,
                text_ids=prompt.ids,
                references=references,
                known=known(sigma),
                once=once,
            )[:, : rows * columns].astype(mx.float32)

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            tokens = latents if beside is None else mx.concatenate([latents, beside[0]], axis=1)
            if negative is None or not config.guides(sigma):
                return predict(tokens, sigma, prompt)
            of = partial(predict, tokens, sigma)
            towards, away = self.both(partial(of, prompt), partial(of, negative))
            return away + config.guidance * (towards - away)

        return velocity

    def known(self, config: Config, prompt: Prompt, *, zero: bool = False) -> Callable[[mx.array], Known | None]:
        """See `ahead`."""
        dtype = prompt.embeds.dtype
        return self.ahead(
            config,
            "transformer",
            lambda transformer, sigma: transformer.time_guidance_embed(sigma[None], dtype),
            of=dtype,
            zero=zero,
        )

    @staticmethod
    def _predict(transformer: Callable[..., mx.array]) -> Callable[..., mx.array]:
        """mflux 0.24's name for what makes the function of a step. A program may put another in its place, which is
        used then; this one is for what goes on with it.

        Args:
            transformer: takes mflux 0.24's keywords, as `Flux2Transformer` does.
        """

        def predict(
            latents: mx.array,
            latent_ids: mx.array,
            prompt_embeds: mx.array,
            text_ids: mx.array,
            negative_prompt_embeds: mx.array | None,
            negative_text_ids: mx.array | None,
            guidance: float,
            timestep: mx.array,
            image_latents: mx.array | None = None,
            image_latent_ids: mx.array | None = None,
        ) -> mx.array:
            tokens, ids = latents, latent_ids
            if image_latents is not None and image_latent_ids is not None:
                tokens = mx.concatenate([latents, image_latents], axis=1)
                ids = mx.concatenate([latent_ids, image_latent_ids], axis=1)

            def of(embeds: mx.array, places: mx.array) -> mx.array:
                return transformer(
                    hidden_states=tokens, encoder_hidden_states=embeds, timestep=timestep, img_ids=ids, txt_ids=places,
                    guidance=None,
                )[:, : latents.shape[1]]  # fmt: skip

            towards = of(prompt_embeds, text_ids)
            if negative_prompt_embeds is None or negative_text_ids is None:
                return towards
            away = of(negative_prompt_embeds, negative_text_ids)
            return away + guidance * (towards - away)

        return predict

    def _replaced_step(
        self, config: Config, prompt: Prompt, negative: Prompt | None, beside: tuple[mx.array, mx.array] | None
    ) -> Velocity:
        ids = grid_ids(config.height // SIDE, config.width // SIDE)[None]
        images = {} if beside is None else {"image_latents": beside[0], "image_latent_ids": beside[1][None]}
        step: Callable[..., mx.array] | None = None

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            nonlocal step
            if step is None:
                step = called("_predict", called("_predict", self._predict)(self.transformer))
            away = negative if config.guides(sigma) else None
            return step(
                latents=latents.astype(prompt.embeds.dtype),
                latent_ids=ids,
                prompt_embeds=prompt.embeds,
                text_ids=prompt.ids[None],
                negative_prompt_embeds=None if away is None else away.embeds,
                negative_text_ids=None if away is None else away.ids[None],
                guidance=config.guidance,
                timestep=1000 * sigma,
                **images,
            )

        return velocity

    def own_settings(self, config: Config) -> dict[str, object]:
        """The settings that only FLUX.2 has, for the picture, and the schedule: 0.24 wrote none."""
        return {
            "scheduler": config.scheduler_name,
            "small_text_encoder": self.small_text_encoder,
            "small_decoder": self.small_decoder,
        }

"""What generating and editing with FLUX.3 share: its parts, its prompts, and a step's prediction."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property, partial

from mflux.backend import mx
from mflux.errors import CheckpointError
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.latent_creator.tokens import SIDE
from mflux.models.common.memory import LazyComponent
from mflux.models.common.model import key_in_registry
from mflux.models.common.networks.autoencoders.flux2 import AutoencoderKLFlux2
from mflux.models.common.networks.once import Once
from mflux.models.common.pipeline import Pipeline, Velocity
from mflux.models.common.tokenizers.qwen import chat, qwen_tokenizer
from mflux.models.flux3.family import FAMILY
from mflux.models.flux3.latent_creator.flux3_latent_creator import CHANNELS, Flux3LatentCreator
from mflux.models.flux3.model.text_encoder import Flux3TextEncoder
from mflux.models.flux3.model.transformer import Flux3Transformer, grid_ids, text_ids

log = logging.getLogger(__name__)

# Tokens of a prompt at most; it is padded to a multiple, and padding counts as text.
LENGTH, MULTIPLE = 8192, 80
GUIDANCE = 3.5


class Flux3Pipeline(Pipeline):
    """Base of FLUX.3's classes; see `Model` for the arguments that all models have.

    The text encoder is released as soon as the prompts are encoded (they are kept in `prompt_cache`); transformer and
    autoencoder stay for the next image.

    Args:
        compute_precision: as for every model.

    Raises:
        UsageError: another precision.
    """

    family = FAMILY
    latent_creator = Flux3LatentCreator
    default_model = "flux3-image-klein"
    latents = (CHANNELS, SIDE, CHANNELS)
    text_encoder: LazyComponent[Flux3TextEncoder]
    transformer: LazyComponent[Flux3Transformer]
    vae: LazyComponent[AutoencoderKLFlux2]

    def __init__(
        self,
        quantize: int | None = None,
        model_path: str | None = None,
        model_config: ModelConfig | None = None,
        compute_precision: mx.Dtype | None = None,
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
            compute_precision=compute_precision,
        )

    def opened(self) -> None:
        folder = self.root / "text_encoder"
        if not folder.is_dir():
            # It lies with the text encoder, wherever that is.
            folder = self.folder_of(self.component("text_encoder")).root
        self.tokenizers = {"qwen3_vl": qwen_tokenizer(folder)}

    @cached_property
    def flow_map(self) -> bool:
        """Whether each step is told where it goes."""
        found: bool = self.configuration("transformer").flow_map
        return found

    @cached_property
    def is_distilled(self) -> bool:
        """Whether guidance is in the model already."""
        return self.flow_map

    def check_folder(self) -> None:
        super().check_folder()
        asked = self.registered.transformer_overrides.get("flow_map", True)
        if self.flow_map != asked:
            what, other = ("distilled", "flux3-image-klein") if asked is False else ("base", "flux3-image-klein-base")
            has = "has" if self.flow_map else "has no"
            raise CheckpointError(
                f"{self.root} holds FLUX.3's {what} model (its transformer {has} target_timestep_embedder), and was "
                f"taken for {key_in_registry(self.registered)}: say --base-model {other}"
            )

    # ---- the stages of an image

    def steps_of(self, asked: int | None) -> int:
        """How many steps are taken where none are said: the model's own."""
        return self.model_config.default_steps if asked is None else asked

    def guidance_of(self, asked: float | None) -> float:
        """What is taken for it; 0 where the model was made without."""
        if self.is_distilled:
            return 0.0
        return GUIDANCE if asked is None else asked

    def is_guided(self, guidance: float | None) -> bool:
        return guidance is not None and guidance != 1 and not self.is_distilled

    def prompts_of(self, prompt: str, guidance: float) -> list[str]:
        """The prompt, and where there is guidance, the empty prompt to be guided away from."""
        return [prompt, ""] if self.is_guided(guidance) else [prompt]

    def encode_prompts(self, *prompts: str) -> list[mx.array]:
        """Embeddings (1, L, D) of prompts, the text encoder being loaded once for all of them."""
        return self.remembered(prompts, self._encode, "text_encoder")

    def _encode(self, prompts: list[str]) -> Iterator[mx.array]:
        tokenizer = self.tokenizers["qwen3_vl"]
        for prompt in prompts:
            text = chat(prompt)
            length = len(tokenizer.encode(text))
            if length > LENGTH:
                log.warning("the prompt is longer than the %d tokens this model reads: its end is left out", LENGTH)
            padded = min(-(-length // MULTIPLE) * MULTIPLE, LENGTH)
            embeds = self.text_encoder(*tokenizer([text], max_length=padded))
            mx.eval(embeds)
            yield embeds

    def predictor(
        self,
        config: Config,
        prompt: mx.array,
        negative: mx.array | None = None,
        *,
        references: tuple[mx.array, mx.array] | None = None,
    ) -> Velocity:
        """The velocity of latents at a noise level, without classifier-free guidance or with it
        (arxiv.org/abs/2207.12598).

        Args:
            prompt, negative: see `encode_prompts`; the configuration's guidance says how far to go from the negative
                prompt to the prompt, 1 being the prompt.
            references: tokens of reference images (1, R, 128), and their positions (R, 4).
        """
        dtype = prompt.dtype
        image_ids = grid_ids(config.height // SIDE, config.width // SIDE)
        tokens, ids = (references[0].astype(dtype), references[1]) if references is not None else (None, None)

        def after(sigma: mx.array) -> mx.array | None:
            """The noise level to which the step goes."""
            if not self.flow_map:
                return None
            lower = [level for level in levels if level < float(sigma)]
            return mx.array([max(lower, default=0.0)])

        levels = [float(level) for level in config.scheduler.sigmas]
        known = self.ahead(
            config,
            "transformer",
            lambda transformer, sigma: transformer.condition(sigma[None], after(sigma), dtype),
            of=dtype,
        )
        once = Once()

        def predict(latents: mx.array, sigma: mx.array, prompt: mx.array) -> mx.array:
            return self.predicting(config)(
                latents.astype(dtype),
                sigma=sigma[None],
                next_sigma=after(sigma),
                prompt_embeds=prompt,
                image_ids=image_ids,
                text_ids=text_ids(prompt.shape[1]),
                references=tokens,
                reference_ids=ids,
                known=known(sigma),
                once=once,
            ).astype(mx.float32)

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            if negative is None or not config.guides(sigma):
                return predict(latents, sigma, prompt)
            of = partial(predict, latents, sigma)
            towards, away = self.both(partial(of, prompt), partial(of, negative))
            return away + config.guidance * (towards - away)

        return velocity

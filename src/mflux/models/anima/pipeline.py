"""What generating with Anima needs beside its four steps: tokenizers, prompts, and a step's prediction."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.saving import copy_beside
from mflux.errors import UsageError
from mflux.hub import resolve_model
from mflux.models.anima.family import FAMILY
from mflux.models.anima.latent_creator.anima_latent_creator import CHANNELS, SIDE, AnimaLatentCreator
from mflux.models.anima.model.text_conditioner import AnimaTextConditioner
from mflux.models.anima.model.text_encoder import AnimaTextEncoder
from mflux.models.anima.model.transformer import AnimaTransformer
from mflux.models.anima.schedule import AnimaErSdeScheduler
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.memory import LazyComponent
from mflux.models.common.networks.autoencoders.wan import AutoencoderWan
from mflux.models.common.networks.once import Once
from mflux.models.common.pipeline import Pipeline, Velocity
from mflux.models.common.schedulers.er_sde_scheduler import ER_SDE
from mflux.models.common.tokenizers.prompt_tokenizers import PromptTokenizer, t5_tokenizer
from mflux.models.common.tokenizers.qwen import QwenTokenizer, qwen_tokenizer

log = logging.getLogger(__name__)

GUIDANCE, TURBO, TURBO_GUIDANCE = 4.0, "anima-turbo", 1.0
# Anima's own repository has no tokenizers: they are those of the models that it was made with.
QWEN_REPOSITORY, T5_REPOSITORY = "Qwen/Qwen3-0.6B-Base", "google/t5-v1_1-xxl"
QWEN_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
T5_FILES = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class AnimaPipeline(Pipeline):
    """Base of Anima's class; see `Model` for the arguments that all models have.

    The text encoder and the conditioner are released as soon as the prompts are encoded (they are kept in
    `prompt_cache`); transformer and autoencoder stay for the next image.

    Args:
        compute_precision: as for every model.

    Raises:
        UsageError: another precision, or 3 bits, of which nothing but noise comes.
    """

    family = FAMILY
    latent_creator = AnimaLatentCreator
    default_model = TURBO
    schedule = "er_sde"
    negative_above = 1.0
    latents = (CHANNELS, SIDE, CHANNELS)
    text_encoder: LazyComponent[AnimaTextEncoder]
    text_conditioner: LazyComponent[AnimaTextConditioner]
    transformer: LazyComponent[AnimaTransformer]
    vae: LazyComponent[AutoencoderWan]

    def __init__(
        self,
        quantize: int | None = None,
        model_path: str | None = None,
        model_config: ModelConfig | None = None,
        lora_paths: list[str] | None = None,
        lora_scales: list[float] | None = None,
        bake_lora: bool = True,
        compute_precision: mx.Dtype | None = None,
        *,
        text_encoder_paths: list[str] | None = None,
        vae_path: str | None = None,
    ):
        if quantize == 3:
            raise UsageError("quantize (--quantize) is 3, and in 3 bits Anima gives noise: take 4, 5, 6 or 8")
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
        qwen, t5 = self.tokenizer_folders()
        self.tokenizers: dict[str, QwenTokenizer | PromptTokenizer] = {
            "qwen3": qwen_tokenizer(qwen), "t5": t5_tokenizer(t5),
        }  # fmt: skip
        if self.key != TURBO and self.model_config.base_model is None:
            # The three share a repository, whose name is all that an image would say.
            self.model_config.base_model = self.key

    def tokenizer_folders(self) -> tuple[Path, Path]:
        """Where the tokenizers of Qwen3 and T5 lie, downloaded if need be.

        Raises:
            DownloadError: the model has none, and they cannot be had.
        """
        qwen, *t5 = (self.root / name for name in ("tokenizer", "t5_tokenizer", "tokenizer_2"))
        found = next((folder for folder in t5 if folder.is_dir()), None)
        if not qwen.is_dir():
            pair = ["vocab.json", "merges.txt"]
            qwen = resolve_model(QWEN_REPOSITORY, QWEN_FILES, required=["tokenizer.json"], alternatives=[pair])
        if found is None:
            found = resolve_model(T5_REPOSITORY, T5_FILES, required=["spiece.model"], alternatives=[["tokenizer.json"]])
        return qwen, found

    def copy_beside(self, target: Path) -> None:
        super().copy_beside(target)
        qwen, t5 = self.tokenizer_folders()
        if not (target / "tokenizer").is_dir():
            copy_beside(qwen, target / "tokenizer", QWEN_FILES)
        if not any((target / name).is_dir() for name in ("t5_tokenizer", "tokenizer_2")):
            copy_beside(t5, target / "t5_tokenizer", T5_FILES)

    # ---- the stages of an image

    def settings(self, *, scheduler: str | None = None, **settings: Any) -> Config:
        """As `Pipeline.settings`; er_sde is Anima's own."""
        config = super().settings(scheduler=scheduler, **settings)
        if config.scheduler_name in ER_SDE:
            config.use(AnimaErSdeScheduler(config))
        return config

    def guidance_of(self, asked: float | None) -> float:
        """What is taken for it: Turbo's is 1, which is none."""
        if asked is not None:
            return asked
        return TURBO_GUIDANCE if self.key == TURBO else GUIDANCE

    def is_guided(self, guidance: float | None) -> bool:
        return guidance is not None and guidance != 1

    def encode_prompts(self, *prompts: str) -> list[mx.array]:
        """Embeddings (1, L, D) of prompts, L at least 512; both encoders are loaded once for all of them."""
        return self.remembered(prompts, self._encode, "text_encoder", "text_conditioner")

    def _encode(self, prompts: list[str]) -> Iterator[mx.array]:
        ids = [self.ids_of(prompt) for prompt in prompts]
        states = [self.text_encoder(mx.array([words])) for words, _ in ids]
        mx.eval(states)
        self.release_encoders("text_encoder")
        for state, (_, queries) in zip(states, ids, strict=True):
            embeds = self.text_conditioner(state, mx.array([queries]))
            mx.eval(embeds)
            yield embeds

    def ids_of(self, prompt: str) -> tuple[Sequence[int], Sequence[int]]:
        """A prompt's tokens for Qwen3, that which ends a text where there are none, and for T5, with its last."""
        qwen, t5, most = self.tokenizers["qwen3"], self.tokenizers["t5"], self.longest_prompt
        assert isinstance(qwen, QwenTokenizer) and isinstance(t5, PromptTokenizer)
        words, queries = qwen.encode(prompt) or [qwen.pad], t5.whole(prompt)
        if len(words) > most or len(queries) > most:
            log.warning("the prompt is longer than the %d tokens this model is given: its end is left out", most)
        return words[:most], queries if len(queries) <= most else [*queries[: most - 1], queries[-1]]

    def predictor(self, config: Config, positive: mx.array, negative: mx.array | None = None) -> Velocity:
        """The velocity of latents at a noise level, without classifier-free guidance or with it
        (arxiv.org/abs/2207.12598).

        Args:
            positive, negative: see `encode_prompts`; the configuration's guidance says how far to go from the negative
                prompt to the prompt, 1 being the prompt.
        """
        dtype = positive.dtype
        known = self.ahead(
            config,
            "transformer",
            lambda transformer, sigma: transformer.time_embed(sigma[None], dtype),
            of=dtype,
        )
        once = Once()

        def predict(latents: mx.array, sigma: mx.array, prompt: mx.array) -> mx.array:
            return self.predicting(config)(
                latents, sigma=sigma[None], prompt_embeds=prompt, known=known(sigma), once=once
            ).astype(mx.float32)

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            if negative is None or not config.guides(sigma):
                return predict(latents, sigma, positive)
            of = partial(predict, latents, sigma)
            towards, away = self.both(partial(of, positive), partial(of, negative))
            return away + config.guidance * (towards - away)

        return velocity

"""What FIBO and FIBO-Edit share: prompts of any length, classifier-free guidance, and the check of a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from mflux.backend import mx
from mflux.errors import CheckpointError
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.memory import LazyComponent
from mflux.models.common.networks.once import Once
from mflux.models.common.networks.text_encoders.smollm3 import SmolLM3TextEncoder
from mflux.models.common.pipeline import Pipeline, Velocity
from mflux.models.common.tokenizers.prompt_tokenizers import WholeTokenizer, whole_tokenizer
from mflux.models.fibo.family import FAMILY
from mflux.models.fibo.latent_creator.fibo_latent_creator import FiboLatentCreator
from mflux.models.fibo.model.autoencoder import FiboAutoencoder
from mflux.models.fibo.model.transformer import FiboTransformer

log = logging.getLogger(__name__)

_MOST_TOKENS = 3000


class FiboPipeline(Pipeline):
    """The arguments are `Model`'s, in mflux 0.24's order; it had no LoRAs for FIBO."""

    family = FAMILY
    negative_above = 1.0
    latent_creator = FiboLatentCreator
    latents = (48, 16, 48)
    text_encoder: LazyComponent[SmolLM3TextEncoder]
    transformer: LazyComponent[FiboTransformer]
    vae: LazyComponent[FiboAutoencoder]

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
        compute_precision: mx.Dtype | None = None,
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
        self.tokenizers: dict[str, WholeTokenizer] = {"fibo": whole_tokenizer(self.root / "tokenizer")}

    def check_folder(self) -> None:
        super().check_folder()

        transformer, text = self.configuration("transformer"), self.configuration("text_encoder")
        if not transformer.text_encoder_dim == text.hidden_size == transformer.joint_attention_dim / 2:
            raise CheckpointError(
                f"{self.root} is put together from different models, its transformer reads states "
                f"{transformer.text_encoder_dim} wide, two of them together {transformer.joint_attention_dim}, and its "
                f"text encoder writes {text.hidden_size}: fetch it again"
            )

    def settings(self, *, scheduler: str | None = None, **settings: Any) -> Config:
        # The reference's schedule has the name that mflux 0.24 gave to another one; see the README.
        if scheduler in ("flow_match_euler_discrete", "FlowMatchEulerDiscreteScheduler"):
            scheduler = "linear"
        return super().settings(scheduler=scheduler, **settings)

    def is_guided(self, guidance: float | None) -> bool:
        # Made without, whatever is asked for.
        return super().is_guided(guidance) and "fibo-lite" not in self.model_config.aliases

    def encode_prompts(self, *prompts: str) -> list[list[mx.array]]:
        """All hidden states of the text encoder, (1, T, D) each, for every prompt."""
        return self.remembered(prompts, self._encode, "text_encoder")

    def _encode(self, prompts: list[str]) -> Iterator[list[mx.array]]:
        for prompt in prompts:
            # Token by token, a prompt that is empty would be none at all: the reference has the first token then.
            ids = self.tokenizers["fibo"].encode(prompt, max_length=_MOST_TOKENS) if prompt else []
            if prompt and self.tokenizers["fibo"].is_cut(prompt, max_length=_MOST_TOKENS):
                log.warning("the prompt is longer than the %d tokens FIBO reads: its end is left out", _MOST_TOKENS)
            states = self.text_encoder(mx.array([ids or [self.text_encoder.config.bos_token_id]]))
            mx.eval(states)
            yield states

    def predictor(
        self,
        config: Config,
        positive: list[mx.array],
        negative: list[mx.array] | None = None,
        *,
        image_ids: mx.array,
        reference: mx.array | None = None,
    ) -> Velocity:
        """The velocity of latents at a noise level, with guidance where there is a negative prompt.

        The transformer runs once for each prompt at its own length: what is masked in a batch of both is not there in
        the first place.

        Args:
            positive, negative: see `encode_prompts`.
            image_ids: where the tokens are, (L, 3), the reference's after the image's.
            reference: tokens of the image that an edit starts from, (1, R, 48).
        """
        dtype = positive[0].dtype
        texts = [self.own_transformer().project_text(layers) for layers in (positive, negative) if layers is not None]
        mx.eval(texts)
        if not self.keep.for_next_image:
            # They are as large again as what was made of them.
            self.prompt_cache.clear()

        known = self.ahead(
            config, "transformer", lambda transformer, sigma: transformer.condition(sigma[None], dtype), of=dtype
        )

        once = Once()

        def predict(latents: mx.array, sigma: mx.array, text: Sequence[mx.array]) -> mx.array:
            tokens = latents if reference is None else mx.concatenate([latents, reference], axis=1)
            prediction = self.transformer(
                tokens.astype(dtype),
                sigma=sigma.reshape(-1),
                text=text,
                image_ids=image_ids,
                known=known(sigma),
                once=once,
            )
            # Guidance multiplies a small difference of the two.
            return prediction[:, : latents.shape[1]].astype(mx.float32)

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            if len(texts) == 1 or not config.guides(sigma):
                return predict(latents, sigma, texts[0])
            towards, away = self.both(*(partial(predict, latents, sigma, text) for text in texts), apart=True)
            return away + config.guidance * (towards - away)

        return velocity

"""What lies between ERNIE-Image's prompts and its steps: encoding, and a step's prediction."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

from mflux.backend import mx
from mflux.errors import CheckpointError
from mflux.models.common.config.config import Config
from mflux.models.common.memory import LazyComponent
from mflux.models.common.networks.once import Once
from mflux.models.common.pipeline import Pipeline, Velocity
from mflux.models.common.tokenizers.prompt_tokenizers import WholeTokenizer, whole_tokenizer
from mflux.models.ernie_image.family import FAMILY
from mflux.models.ernie_image.latent_creator.ernie_latent_creator import CHANNELS, SIDE, ErnieLatentCreator
from mflux.models.ernie_image.model.autoencoder import ErnieAutoencoder
from mflux.models.ernie_image.model.text_encoder import LONGEST, ErnieTextEncoder
from mflux.models.ernie_image.model.transformer import ErnieTransformer

log = logging.getLogger(__name__)


class ErniePipeline(Pipeline):
    """Base of ERNIE-Image's class; see `Model` for the arguments that all models have."""

    family = FAMILY
    latent_creator = ErnieLatentCreator
    default_model = "ernie-image-turbo"
    negative_above = 1.0
    latents = (CHANNELS, SIDE, CHANNELS)
    text_encoder: LazyComponent[ErnieTextEncoder]
    transformer: LazyComponent[ErnieTransformer]
    vae: LazyComponent[ErnieAutoencoder]

    def opened(self) -> None:
        self.tokenizers: dict[str, WholeTokenizer] = {"ernie": whole_tokenizer(self.root / "tokenizer")}

    def check_folder(self) -> None:
        super().check_folder()
        reads, writes = self.configuration("transformer").text_in_dim, self.configuration("text_encoder").hidden_size
        if reads != writes:
            raise CheckpointError(
                f"{self.root} is put together from different models, its transformer reads text {reads} wide and its "
                f"text encoder writes {writes}: fetch it again"
            )

    def encode_prompts(self, *prompts: str) -> list[mx.array]:
        """The text encoder's (1, T, D) of several prompts, T being as many tokens as each has, 2048 at most."""
        return self.remembered(prompts, self._encode, "text_encoder")

    def _encode(self, prompts: list[str]) -> Iterator[mx.array]:
        tokenizer = self.tokenizers["ernie"]
        for prompt in prompts:
            if tokenizer.is_cut(prompt, max_length=LONGEST):
                log.warning("the prompt is longer than the %d tokens this model reads: its end is left out", LONGEST)
            # An empty prompt of a tokenizer without a first token: the reference has one all the same.
            ids = tokenizer.encode(prompt, max_length=LONGEST) or [self.text_encoder.config.bos_token_id]
            (prompt_embeds,) = self.text_encoder(mx.array([ids]))
            mx.eval(prompt_embeds)
            yield prompt_embeds

    def predictor(self, config: Config, positive: mx.array, negative: mx.array | None = None) -> Velocity:
        """The velocity of latents at a noise level, guided away from the negative prompt if there is one.

        The transformer runs once for each prompt at its own length: what is masked in a batch of both is not there in
        the first place.

        Args:
            positive, negative: encoded prompts (1, T, D).
        """
        dtype = positive.dtype
        known = self.ahead(
            config, "transformer", lambda transformer, sigma: transformer.condition(sigma[None], dtype), of=dtype
        )
        once = Once()

        def predict(latents: mx.array, sigma: mx.array, prompt_embeds: mx.array) -> mx.array:
            prediction = self.predicting(config)(
                latents.astype(dtype),
                sigma=sigma.reshape(-1),
                prompt_embeds=prompt_embeds,
                known=known(sigma),
                once=once,
            )
            return prediction.astype(mx.float32)

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            if negative is None or not config.guides(sigma):
                return predict(latents, sigma, positive)
            of = partial(predict, latents, sigma)
            towards, away = self.both(partial(of, positive), partial(of, negative), apart=True)
            return away + config.guidance * (towards - away)

        return velocity

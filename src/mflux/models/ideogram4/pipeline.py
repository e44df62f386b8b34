"""Ideogram 4: prompts, and a step's prediction by two transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mflux.backend import mx
from mflux.errors import CheckpointError, UsageError
from mflux.models.common.config.config import Config
from mflux.models.common.memory import LazyComponent
from mflux.models.common.networks.modulation import Known
from mflux.models.common.networks.once import Once
from mflux.models.common.pipeline import Pipeline, Velocity
from mflux.models.common.tokenizers.qwen import chat, qwen_tokenizer
from mflux.models.ideogram4.family import FAMILY
from mflux.models.ideogram4.latent_creator.ideogram4_latent_creator import SIDE, Ideogram4LatentCreator
from mflux.models.ideogram4.model.autoencoder import Ideogram4Autoencoder
from mflux.models.ideogram4.model.text_encoder import Ideogram4TextEncoder
from mflux.models.ideogram4.model.transformer import Ideogram4Transformer


class Ideogram4Pipeline(Pipeline):
    """Base of Ideogram 4's class; see `Model` for the arguments that all models have."""

    family = FAMILY
    latent_creator = Ideogram4LatentCreator
    default_model = "ideogram-4-fp8"
    latents = (128, 16, 128)
    text_encoder: LazyComponent[Ideogram4TextEncoder]
    transformer: LazyComponent[Ideogram4Transformer]
    unconditional_transformer: LazyComponent[Ideogram4Transformer]
    vae: LazyComponent[Ideogram4Autoencoder]

    def opened(self) -> None:
        self.tokenizers = {"ideogram4": qwen_tokenizer(self.root / "tokenizer")}

    def check_folder(self) -> None:
        super().check_folder()
        states = len(Ideogram4TextEncoder.hidden_states)
        width = states * self.configuration("text_encoder").hidden_size
        for name in ("transformer", "unconditional_transformer"):
            found = self.configuration(name)
            if (found.llm_features_dim, found.in_channels) != (width, self.latents[2]):
                raise CheckpointError(
                    f"{self.root} holds parts of different models: the {name.replace('_', ' ')} reads "
                    f"{found.llm_features_dim} numbers a token of the prompt and {found.in_channels} of the image, "
                    f"and there are {width} and {self.latents[2]}; fetch it again"
                )

    @property
    def conditional_transformer(self) -> Ideogram4Transformer:
        """mflux 0.24's name of the transformer that sees the prompt."""
        return self.transformer

    def is_guided(self, guidance: float | None) -> bool:
        # Without a number, a preset guides.
        return guidance != 1

    def encode_prompts(self, *prompts: str) -> list[mx.array]:
        """The text encoder's (1, T, D) of several prompts: T is as many tokens as each has, the turn around it
        included.

        Raises:
            UsageError: one is longer than the model reads.
        """
        for prompt in prompts:
            length = len(self.tokenizers["ideogram4"].encode(chat(prompt)))
            if length > self.longest_prompt:
                raise UsageError(
                    f"the prompt has {length:,} tokens, and this model reads {self.longest_prompt:,}: shorten it"
                )
        return self.remembered(prompts, self._encode, "text_encoder")

    def _encode(self, prompts: list[str]) -> Iterator[mx.array]:
        for prompt in prompts:
            ids, _ = self.tokenizers["ideogram4"]([chat(prompt)], max_length=self.longest_prompt, pad_to_longest=True)
            prompt_embeds = self.text_encoder(ids)
            mx.eval(prompt_embeds)
            yield prompt_embeds

    def predictor(self, config: Config, prompt_embeds: mx.array, guidance: tuple[float, ...]) -> Velocity:
        """The velocity of latents at a noise level, guided away from what the second transformer makes of the image
        alone (Karras et al. 2024, arxiv.org/abs/2406.02507, has a second model guide; here it was taught without
        prompts).

        Args:
            prompt_embeds: the encoded prompt (1, T, D).
            guidance: of each step: 1 is the prompt's prediction, which needs no second pass.
        """
        rows, columns = config.height // SIDE, config.width // SIDE
        strengths = dict(zip(map(float, self.sigmas_ahead(config)), guidance, strict=True))
        dtype, once = prompt_embeds.dtype, Once()
        known = self._known(config, "transformer", dtype)
        apart = self._known(config, "unconditional_transformer", dtype) if any(one != 1 for one in guidance) else known

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            x, time = latents.astype(dtype), (1 - sigma)[None]
            strength = strengths[float(sigma)] if config.guides(sigma) else 1.0
            about: dict[str, Any] = {"time": time, "rows": rows, "columns": columns, "once": once}

            def told() -> mx.array:
                found: mx.array = self.own_transformer()(x, prompt_embeds=prompt_embeds, known=known(sigma), **about)
                return found.astype(mx.float32)

            def alone() -> mx.array:
                return self.unconditional_transformer(x, known=apart(sigma), **about).astype(mx.float32)

            if strength == 1:
                towards = told()
            else:
                towards, without = self.both(told, alone)
                towards = strength * towards + (1 - strength) * without
            # The transformers predict image - noise.
            return -towards

        return velocity

    def _known(self, config: Config, name: str, dtype: mx.Dtype) -> Callable[[mx.array], Known | None]:
        def condition(transformer: Ideogram4Transformer, sigma: mx.array) -> mx.array:
            return transformer.condition((1 - sigma)[None], dtype)

        return self.ahead(config, name, condition, of=dtype)

"""What Krea 2 and its ControlNet share: a folder in any layout, prompts, the schedule, and a step's prediction."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.folders import read_json
from mflux.errors import CheckpointError
from mflux.hub import cached_copy
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.latent_creator.patches import PatchLatentCreator
from mflux.models.common.memory import LazyComponent
from mflux.models.common.model import resolve
from mflux.models.common.networks.autoencoders.wan import AutoencoderWan
from mflux.models.common.networks.once import Once
from mflux.models.common.pipeline import Pipeline, Velocity
from mflux.models.common.schedulers.er_sde_scheduler import ER_SDE
from mflux.models.common.tokenizers.qwen import DESCRIBE, DESCRIBE_TOKENS, chat, qwen_tokenizer
from mflux.models.krea2.family import FAMILY
from mflux.models.krea2.latent_creator.krea2_latent_creator import CHANNELS, SIDE, Krea2LatentCreator
from mflux.models.krea2.layouts import SINGLE_FILES
from mflux.models.krea2.model.text_encoder import Krea2TextEncoder
from mflux.models.krea2.model.transformer import Krea2Transformer
from mflux.utils.paths import is_file, is_folder, user_path

log = logging.getLogger(__name__)

# The template around a prompt. It is cut before its end is added: so the model was trained.
_BEFORE, _END = chat("\0", system=DESCRIBE).split("\0")
# Tokens of the template's beginning and the prompt.
_LONGEST = 512 + DESCRIBE_TOKENS - 5
# Turbo was distilled with this shift, whatever the size of an image.
TURBO_MU = 1.15
# What mflux 0.24 takes where nothing is said.


class Krea2Pipeline(Pipeline):
    """Base of Krea 2's classes; see `Model` for the arguments that all models have, which are in mflux 0.24's order."""

    family = FAMILY
    latent_creator = Krea2LatentCreator
    default_model = "krea-2"
    negative_above = 1.0
    latents = (CHANNELS, SIDE, 4 * CHANNELS)
    text_encoder: LazyComponent[Krea2TextEncoder]
    transformer: LazyComponent[Krea2Transformer]
    vae: LazyComponent[AutoencoderWan]

    def opened(self) -> None:
        self.tokenizers = {"qwen3vl": qwen_tokenizer(self.root / "tokenizer")}
        if self.is_distilled:
            self.model_config.sigma_base_shift = self.model_config.sigma_max_shift = TURBO_MU

    # ---- the folder

    def resolve_folder(self, model_path: str | None, model_config: ModelConfig) -> Path:
        name = self.source(model_path, model_config)
        parts = [component for component in self.own_components() if component.folder not in self._files]
        if (file := _fetched_by_024(name)) is not None:
            # Complete in its own way: the same transformer need not be fetched once more.
            own = [component for component in parts if component.folder != "transformer"]
            return resolve(name, own, (*self.family.beside, file))
        return resolve(name, parts, self.family.beside)

    def check_folder(self) -> None:
        index = self._index()
        if (layers := index.get("text_encoder_select_layers")) is not None:
            self.folder.overrides["text_encoder"] = {"text_encoder_select_layers": layers}
        self.folder.overrides["model_index"] = {"is_distilled": self.is_distilled}
        super().check_folder()
        if index.get("patch_size", 2) != 2:
            raise CheckpointError(
                f"{self.root}: model_index.json says patches of {index['patch_size']!r}, and only those of 2 are built"
            )
        text, transformer = self.configuration("text_encoder"), self.configuration("transformer")
        writes = (len(text.text_encoder_select_layers), text.hidden_size)
        reads = (transformer.num_text_layers, transformer.text_hidden_dim)
        if reads != writes:
            raise CheckpointError(
                f"{self.root} is put together from different models, its transformer reads {reads[0]} hidden states "
                f"{reads[1]} wide and its text encoder writes {writes[0]} of {writes[1]}: fetch it again"
            )

    def _index(self) -> dict[str, Any]:
        path = self.root / "model_index.json"
        return read_json(path) if is_file(path) else {}

    @cached_property
    def is_distilled(self) -> bool:
        """Whether it is Turbo: by the name of a single file, by the folder's own word, or by the model's name."""
        file = self.folder.files.get("transformer")
        words = set(re.split(r"[\W_]+", file.name.lower())) if file is not None else set()
        if words & {"turbo", "raw"}:
            return "raw" not in words
        told = self._index().get("is_distilled") if file is None else None
        return bool(told) if told is not None else "krea-2-raw" not in self.registered.aliases

    # ---- the stages of an image

    def settings(self, *, scheduler: str | None = None, **settings: Any) -> Config:
        """As `Pipeline.settings`; er_sde is mflux 0.24's, and shifts by the size of the image as it did."""
        config = super().settings(scheduler=scheduler, **settings)
        if scheduler in ER_SDE:
            config.model_config = self.registered
        return config

    def encode_prompts(self, *prompts: str) -> list[mx.array]:
        """The text encoder's (1, T, states, D) of several prompts: T is as many tokens as each has behind the
        template's beginning, 512 at most."""
        return self.remembered(prompts, self._encode, "text_encoder")

    def _encode(self, prompts: list[str]) -> Iterator[mx.array]:
        tokenizer = self.tokenizers["qwen3vl"]
        end = tokenizer.encode(_END)
        for prompt in prompts:
            if tokenizer.is_cut(_BEFORE + prompt, max_length=_LONGEST):
                most = _LONGEST - DESCRIBE_TOKENS
                log.warning("the prompt is longer than the %d tokens this model reads: its end is left out", most)
            ids = tokenizer.encode(_BEFORE + prompt, max_length=_LONGEST) + end
            embeds = self.text_encoder(mx.array([ids]))[:, DESCRIBE_TOKENS:]
            mx.eval(embeds)
            yield embeds

    def predictor(
        self,
        config: Config,
        positive: mx.array,
        negative: mx.array | None = None,
        **beside: Any,
    ) -> Velocity:
        """The velocity of latents at a noise level, guided away from the negative prompt if there is one.

        Args:
            positive, negative: encoded prompts (1, T, states, D).
            beside: what a variant's transformer takes as well.
        """
        dtype = positive.dtype
        height, width = config.height, config.width
        transformer = self.own_transformer()
        known = self.ahead(
            config, "transformer", lambda transformer, sigma: transformer.condition(sigma[None], dtype), of=dtype
        )
        once = Once()

        def predict(latents: mx.array, sigma: mx.array, prompt_embeds: mx.array) -> mx.array:
            tokens = PatchLatentCreator.pack_latents(latents, height, width)
            prediction = transformer(
                tokens.astype(dtype), sigma=sigma.reshape(-1), prompt_embeds=prompt_embeds,
                grid=(height // 16, width // 16), known=known(sigma), once=once, **beside,
            )  # fmt: skip
            return PatchLatentCreator.unpack_latents(prediction.astype(mx.float32), height, width)

        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            if negative is None or not config.guides(sigma):
                return predict(latents, sigma, positive)
            of = partial(predict, latents, sigma)
            towards, away = self.both(partial(of, positive), partial(of, negative), apart=True)
            return away + config.guidance * (towards - away)

        return velocity


def _fetched_by_024(name: str) -> str | None:
    """The transformer's single file in the cached copy of a repository that mflux 0.24 fetched; None where there is no
    such copy, or what is published is there as well."""
    if is_folder(user_path(name)) or name.count("/") != 1 or name[0] in "./~":
        return None
    cached = cached_copy(name)
    if cached is None or (cached / "transformer").is_dir():
        return None
    return next((file for file in SINGLE_FILES if is_file(cached / file)), None)

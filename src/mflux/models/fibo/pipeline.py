"""What FIBO and FIBO-Edit share: prompts of any length, classifier-free guidance, and the check of a folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from mflux.backend import mx
from mflux.errors import CheckpointError
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.text_encoders.smollm3 import SmolLM3Config
from mflux.models.common.pipeline import Pipeline
from mflux.models.common.tokenizers.prompt_tokenizers import WholeTokenizer, whole_tokenizer
from mflux.models.fibo.family import FAMILY
from mflux.models.fibo.latent_creator.fibo_latent_creator import FiboLatentCreator
from mflux.models.fibo.model.autoencoder import FiboAutoencoderConfig
from mflux.models.fibo.model.transformer import FiboTransformerConfig

log = logging.getLogger(__name__)

_MOST_TOKENS = 3000
# The model's velocity, with or without guidance, of latents at a noise level and positions (L, 3).
Guided = Callable[[mx.array, mx.array, mx.array], mx.array]


class FiboPipeline(Pipeline):
    """The arguments are `Pipeline`'s, in mflux 0.24's order; it had no LoRAs for FIBO."""

    family = FAMILY
    latent_creator = FiboLatentCreator

    def __init__(
        self,
        quantize: int | None = None,
        model_path: str | None = None,
        model_config: ModelConfig | None = None,
        lora_paths: list[str] | None = None,
        lora_scales: list[float] | None = None,
        bake_lora: bool = True,
    ):
        super().__init__(quantize, model_path, lora_paths, lora_scales, bake_lora, model_config)
        self.tokenizers: dict[str, WholeTokenizer] = {"fibo": whole_tokenizer(self.root / "tokenizer")}

    def check_folder(self) -> None:
        super().check_folder()

        def read(kind: type, part: str) -> Any:
            return kind.from_dict(self.folder.config(part), source=self.root / part / "config.json")

        transformer = read(FiboTransformerConfig, "transformer")
        vae = read(FiboAutoencoderConfig, "vae")
        text = read(SmolLM3Config, "text_encoder")
        for fits, sentence in (
            (
                transformer.in_channels == vae.z_dim == 48 and vae.spatial_factor == 16,
                f"its autoencoder has {vae.z_dim} channels for every {vae.spatial_factor} pixels of a side and its "
                f"transformer takes {transformer.in_channels}; FIBO's have 48 for every 16",
            ),
            (
                transformer.text_encoder_dim == text.hidden_size == transformer.joint_attention_dim / 2,
                f"its transformer reads states {transformer.text_encoder_dim} wide, two of them together "
                f"{transformer.joint_attention_dim}, and its text encoder writes {text.hidden_size}",
            ),
        ):
            if not fits:
                raise CheckpointError(f"{self.root} is put together from different models, {sentence}: fetch it again")

    def settings(self, *, scheduler: str, **settings: Any) -> Config:
        # The reference's schedule has the name that mflux 0.24 gave to another one; see the README.
        if scheduler in ("flow_match_euler_discrete", "FlowMatchEulerDiscreteScheduler"):
            scheduler = "linear"
        return super().settings(scheduler=scheduler, **settings)

    def encode_prompts(self, *prompts: str) -> list[list[mx.array]]:
        """For each prompt all hidden states of the text encoder, (1, T, D) each; what was seen comes from the cache."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.prompt_cache]
        if missing:
            self.enter("encode")
            for prompt in missing:
                # Token by token, a prompt that is empty would be none at all: the reference has the first token then.
                ids = self.tokenizers["fibo"].encode(prompt, max_length=_MOST_TOKENS) if prompt else []
                if prompt and self.tokenizers["fibo"].is_cut(prompt, max_length=_MOST_TOKENS):
                    log.warning("the prompt is longer than the %d tokens FIBO reads: its end is left out", _MOST_TOKENS)
                states = self.text_encoder(mx.array([ids or [self.text_encoder.config.bos_token_id]]))
                mx.eval(states)
                self.prompt_cache[prompt] = states
            self.encoded("text_encoder")
        return [self.prompt_cache[prompt] for prompt in prompts]

    def guided(self, prompt: str, negative_prompt: str | None, guidance: float) -> Guided:
        """The transformer with its prompts. With a guidance above 1 it runs twice a step, once for each prompt at its
        own length: what is masked in a batch of both is not there in the first place."""
        prompts = [prompt] if guidance <= 1 else [prompt, negative_prompt or ""]
        states = self.encode_prompts(*prompts)
        texts = [self.transformer.project_text(layers) for layers in states]
        mx.eval(texts)
        dtype = states[0][0].dtype
        if self.is_last_picture:
            # They are as large again as what was made of them.
            self.prompt_cache.clear()
            del states

        def predict(latents: mx.array, sigma: mx.array, text: Sequence[mx.array], ids: mx.array) -> mx.array:
            prediction = self.transformer(latents.astype(dtype), sigma=sigma[None], text=text, image_ids=ids)
            # Guidance multiplies a small difference of the two.
            return prediction.astype(mx.float32)

        def velocity(latents: mx.array, sigma: mx.array, ids: mx.array) -> mx.array:
            towards = predict(latents, sigma, texts[0], ids)
            if len(texts) == 1:
                return towards
            # One after the other, so that what they need for themselves is needed once.
            mx.eval(towards)
            away = predict(latents, sigma, texts[1], ids)
            return away + guidance * (towards - away)

        return velocity

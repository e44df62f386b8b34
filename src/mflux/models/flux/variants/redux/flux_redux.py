"""FLUX.1 Redux: pictures as a part of the prompt."""

from __future__ import annotations

from pathlib import Path

from mflux.backend import mx
from mflux.checkpoints.folders import read_json
from mflux.errors import CheckpointError, UsageError
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.flux.family import FAMILY, IMAGE_EMBEDDER, IMAGE_ENCODER
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.model.redux import SiglipConfig, SiglipProcessor
from mflux.models.flux.sources import refuse_strength
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.utils import values
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.image_util import ImageUtil

# Redux's repository holds what reads pictures; what draws is FLUX.1-dev.
_BASE = "black-forest-labs/FLUX.1-dev"


class Flux1Redux(Flux1):
    """FLUX.1-dev with FLUX.1-Redux-dev; see `Pipeline`.

    Reference: diffusers' `FluxPriorReduxPipeline`, whose prompt embeds `FluxPipeline` draws with.
    """

    default_model = "dev-redux"
    repository = _BASE
    components = (*FAMILY.components, IMAGE_ENCODER, IMAGE_EMBEDDER)

    def __init__(
        self,
        quantize: int | None = None,
        model_path: str | None = None,
        lora_paths: list[str] | None = None,
        lora_scales: list[float] | None = None,
        bake_lora: bool = True,
        model_config: ModelConfig | None = None,
    ):
        super().__init__(quantize, model_path, lora_paths, lora_scales, bake_lora, model_config)
        # Told now and not after the prompt is encoded.
        folder = self.folder_of(IMAGE_ENCODER)
        settings = folder.root / "feature_extractor" / "preprocessor_config.json"
        self.processor = SiglipProcessor.from_dict(read_json(settings) if settings.is_file() else {}, source=settings)
        encoder = SiglipConfig.from_dict(folder.config(IMAGE_ENCODER.folder), source=folder.root / IMAGE_ENCODER.folder)
        if problem := self.processor.fits(encoder):
            raise CheckpointError(f"{settings}: {problem}; fetch both again")

    def generate_image(
        self,
        seed: int,
        prompt: str,
        redux_image_paths: list[Path | str],
        num_inference_steps: int = 4,
        height: int | None = None,
        width: int | None = None,
        guidance: float = 4.0,
        redux_image_strengths: list[float] | None = None,
        image_strength: float | None = None,
        scheduler: str = "linear",
    ) -> GeneratedImage:
        """Draw one picture.

        Args:
            seed: 0 to 2^64 - 1; the same seed and settings give the same picture.
            prompt: what to draw; encoded once and kept.
            redux_image_paths: pictures to draw after, one or more.
            num_inference_steps: 1 or more.
            height, width: in pixels, rounded down to multiples of 16; None for the model's own.
            guidance: how closely to follow prompt and pictures.
            redux_image_strengths: how much of each picture, in their order; 1 where there are fewer than pictures.
            image_strength: refused.
            scheduler: "linear", "flow_match_euler_discrete", or "package.module.Class".

        Raises:
            MfluxError: sizes, steps, pictures or weights are unusable; the message says which.
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
        """
        refuse_strength(image_strength)
        paths = list(redux_image_paths or ())
        strengths = settle_strengths(redux_image_strengths, len(paths))
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            guidance=guidance,
            redux_image_paths=paths,
            redux_image_strengths=strengths,
            scheduler=scheduler,
        )

        # 1. Encode the prompt, and the pictures behind it
        embeds, pooled = self.encode_prompt(prompt)
        pictures = [strength * self.encode_picture(path) for path, strength in zip(paths, strengths, strict=True)]
        embeds = mx.concatenate([embeds, *(picture.astype(embeds.dtype) for picture in pictures)], axis=1)

        # 2. Make the noise to start from
        latents = FluxLatentCreator.create_noise(seed, config.height, config.width)

        # 3. Denoise
        latents = self.denoise(config, latents, self.predictor(config, embeds, pooled), seed=seed, prompt=prompt)

        # 4. Decode
        about = {"redux_image_paths": paths, "redux_image_strengths": strengths}
        return self.picture(config, latents, seed=seed, prompt=prompt, **about)

    def encode_picture(self, path: Path | str) -> mx.array:
        """Prompt embeds (1, patches, D) of a picture, from the cache if it was seen."""
        picture = ImageUtil.load_image(path)
        key = picture.size, picture.tobytes()
        if key not in self.prompt_cache:
            self.enter("encode")
            encoder = self.image_encoder
            states = encoder(self.processor(picture, encoder.config))
            embeds = self.image_embedder(states)
            mx.eval(embeds)
            del encoder
            self.encoded("image_encoder", "image_embedder")
            self.prompt_cache[key] = embeds
        return self.prompt_cache[key]


def settle_strengths(strengths: list[float] | None, pictures: int) -> list[float]:
    """One strength for each picture.

    Raises:
        UsageError: no pictures, more strengths than pictures, or one that is no number.
    """
    if not pictures:
        raise UsageError("this model draws after pictures: say which with redux_image_paths (--redux-image-paths)")
    given = [values.real(strength, "redux_image_strengths") for strength in strengths or ()]
    if len(given) > pictures:
        raise UsageError(f"{len(given)} strengths for {pictures} pictures: --redux-image-strengths takes one for each")
    return given + [1.0] * (pictures - len(given))

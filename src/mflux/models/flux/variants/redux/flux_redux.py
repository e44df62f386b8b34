"""FLUX.1 Redux: pictures as a part of the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.folders import read_json
from mflux.errors import CheckpointError, UsageError
from mflux.models.common.memory import LazyComponent, digest_of
from mflux.models.flux.family import FAMILY, IMAGE_EMBEDDER, IMAGE_ENCODER
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.model.redux import ReduxEmbedder, SiglipConfig, SiglipProcessor, SiglipVision
from mflux.models.flux.pipeline import FluxPipeline, Prompt
from mflux.utils import values
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.image_util import ImageUtil

# Redux's repository holds what reads pictures; what draws is FLUX.1-dev.
_BASE = "black-forest-labs/FLUX.1-dev"


class Flux1Redux(FluxPipeline):
    """FLUX.1-dev with FLUX.1-Redux-dev; see `Model`.

    Reference: diffusers' `FluxPriorReduxPipeline`, whose prompt embeds `FluxPipeline` draws with.
    """

    sees_image = True

    default_model = "dev-redux"
    repository = _BASE
    components = (*FAMILY.components, IMAGE_ENCODER, IMAGE_EMBEDDER)
    image_encoder: LazyComponent[SiglipVision]
    image_embedder: LazyComponent[ReduxEmbedder]

    def opened(self) -> None:
        super().opened()
        # Refused now and not after the prompt is encoded.
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
        scheduler: str | None = None,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Generate one image.

        Args:
            seed, prompt, num_inference_steps, scheduler: as for `Flux1.generate_image`.
            redux_image_paths: images to generate after, one or more.
            height, width: in pixels, rounded down to multiples of 16; None for the model's own.
            guidance: how closely to follow prompt and images.
            redux_image_strengths: how much of each image, in their order; 1 where there are fewer than images.
            image_strength: has no use here, as a warning says: it starts from noise.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.

        Raises:
            as `Flux1.generate_image`.
        """
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
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )

        # 1. Encode the prompt, and the images after it
        (encoded,) = self.encode_prompts(prompt)
        images = [
            (strength * embeds).astype(encoded.embeds.dtype)
            for embeds, strength in zip(self.encode_images(paths), strengths, strict=True)
        ]
        encoded = Prompt(mx.concatenate([encoded.embeds, *images], axis=1), encoded.pooled)

        # 2. Make the noise to start from
        latents = FluxLatentCreator.create_noise(seed, config.height, config.width)

        # 3. Denoise
        latents = self.denoise(config, latents, self.predictor(config, encoded), seed=seed, prompt=prompt)

        # 4. Decode
        about: dict[str, Any] = {"redux_image_paths": paths, "redux_image_strengths": strengths}
        return self.make_image(config, latents, seed=seed, prompt=prompt, **about)

    def encode_images(self, paths: Sequence[Path | str]) -> list[mx.array]:
        """Prompt embeds (1, patches, D) of each image."""
        images = [ImageUtil.load_image(path) for path in paths]
        keys = [digest_of(image) for image in images]
        by_key = dict(zip(keys, images, strict=True))

        def encode(missing: list[bytes]) -> Iterator[mx.array]:
            for key in missing:
                states = self.image_encoder(self.processor(by_key[key], self.image_encoder.config))
                embeds = self.image_embedder(states)
                mx.eval(embeds)
                yield embeds

        return self.remembered(keys, encode, "image_encoder", "image_embedder")


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

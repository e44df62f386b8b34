"""SeedVR2: pictures drawn again, larger, in one step."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mflux.backend import mx
from mflux.errors import NotBuiltError
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.memory import LazyComponent, timed
from mflux.models.common.model import key_in_registry
from mflux.models.common.networks.autoencoders import tiling
from mflux.models.common.pipeline import Pipeline
from mflux.models.seedvr2 import colour
from mflux.models.seedvr2.family import FAMILY
from mflux.models.seedvr2.latent_creator.seedvr2_latent_creator import SeedVR2LatentCreator
from mflux.models.seedvr2.layouts import TRANSFORMER_FILES, key_of, resolve_folder
from mflux.models.seedvr2.model.autoencoder import SeedVR2Autoencoder
from mflux.models.seedvr2.model.transformer import SeedVR2Transformer
from mflux.models.seedvr2.sources import read_source, recorded
from mflux.models.seedvr2.text import text_embeds
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.paths import user_path
from mflux.utils.scale_factor import ScaleFactor

# Time goes from 0, the picture, to this, noise.
_NOISE = 1000


class SeedVR2(Pipeline):
    """SeedVR2 3B or 7B; see `Model`. Encodes and decodes in tiles, unless `tiling_config` is None.

    Source: Wang et al. 2025, https://arxiv.org/abs/2506.05301. Reference: github.com/numz/ComfyUI-SeedVR2_VideoUpscaler
    at 4490bd1, for a video of one frame.
    """

    family = FAMILY
    latent_creator = SeedVR2LatentCreator
    default_model = "seedvr2-3b"
    transformer: LazyComponent[SeedVR2Transformer]
    vae: LazyComponent[SeedVR2Autoencoder]

    def __init__(
        self, quantize: int | None = None, model_path: str | None = None, model_config: ModelConfig | None = None
    ):
        super().__init__(quantize, model_path, model_config=model_config)

    def opened(self) -> None:
        # Which of the two it is the weights tell, whatever the folder is called.
        self.model_config = ModelConfig.from_name(key_of(self.folder))
        self.tiling_config = tiling.TilingConfig()

    def resolve_folder(self, model_path: str | None, model_config: ModelConfig) -> Path:
        """
        Raises:
            NotBuiltError: it is the sharp kind of 7B.
            DownloadError: the weights cannot be had.
        """
        _refuse_sharp(model_path)
        return resolve_folder(self.source(model_path, model_config), key_in_registry(model_config), self._files)

    def generate_image(
        self,
        seed: int,
        image_path: str | bytes | os.PathLike,
        resolution: int | ScaleFactor,
        softness: float = 0.0,
    ) -> GeneratedImage:
        """Draw one picture larger.

        Args:
            seed: 0 to 2^64 - 1; the same seed and settings give the same picture.
            image_path: the picture; upright, its transparency and its ICC profile kept.
            resolution: pixels of the shorter side, 16 or more, or how many times as long it is to be, to a multiple
                of 16; both sides become even.
            softness: 0 to 1: how much of the detail is taken away first, so that more is drawn anew.

        Raises:
            MfluxError: picture, size or weights are unusable; the message says which.
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
        """
        # 1. Enlarge the picture
        source = read_source(image_path, resolution, softness)
        pixels = mx.array(source.pixels())[None]
        config = self.settings(
            seed=seed,
            prompt="",
            num_inference_steps=1,
            height=pixels.shape[2],
            width=pixels.shape[3],
            guidance=1.0,
            image_path=image_path,
        )

        # 2. Encode it, and make the noise to start from
        with timed("encode"):
            condition = self.encode_pixels(pixels)
        _, channels, _, rows, columns = condition.shape
        latents = SeedVR2LatentCreator.create_noise_latents(seed, rows, columns, latent_channels=channels)
        condition = SeedVR2LatentCreator.create_condition(condition)
        text = text_embeds()

        # 3. Denoise, in one step
        def velocity(latents: mx.array, sigma: mx.array) -> mx.array:
            # The transformer has channels last.
            x = mx.concatenate([latents, condition], axis=1)[:, :, 0].transpose(0, 2, 3, 1)
            return self.own_transformer()(x, text, _NOISE * sigma).transpose(0, 3, 1, 2)[:, :, None]

        latents = self.denoise(config, latents, velocity, seed=seed, prompt="")

        # 4. Decode, and give it the source's colours
        self.make_room_for("decode")
        with timed("decode"):
            decoded = self.decode(latents, config)
        with timed("colours"):
            seen = np.s_[:, : source.height, : source.width]
            drawn = colour.correct(np.array(decoded[0].astype(mx.float32))[seen], np.array(pixels[0])[seen])
        parameters = {"resolution": recorded(resolution), "softness": float(softness) or None}
        size = {"width": source.width, "height": source.height}
        image = self.finished(config, mx.array(drawn)[None], seed=seed, prompt="", parameters=parameters, **size)
        image.image = source.dressed(image.image)
        return image


def _refuse_sharp(model_path: str | None) -> None:
    """
    Raises:
        NotBuiltError: a name, or the files of a folder, ask for the sharp kind of 7B.
    """
    if model_path is None:
        return
    folder = user_path(model_path)
    try:
        names = [file.name for file in folder.glob("*.safetensors")] if folder.is_dir() else [folder.name]
    except OSError:
        return  # whoever opens it says what is wrong
    sharp = any("sharp" in name.lower() for name in names) and not set(names) & set(TRANSFORMER_FILES.values())
    if sharp:
        raise NotBuiltError(f"{model_path} is SeedVR2 7B sharp, which is not built: use --model seedvr2-7b")

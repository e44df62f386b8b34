"""A program as a user writes it, for `make lint`: mypy sees of the public classes what an editor would show.

It is checked and never run. An ignored error that mypy does not find is an error itself.
"""

from pathlib import Path
from typing import assert_type

import PIL.Image

import mflux
from mflux.models.common.config import ModelConfig
from mflux.models.common.networks.autoencoders.kl import AutoencoderKL
from mflux.models.common.networks.autoencoders.wan import AutoencoderWan
from mflux.models.depth_pro.model.depth_pro import DepthPro
from mflux.models.fibo_vlm.model.fibo_vlm import FiboVLM
from mflux.models.flux.model.transformer import FluxTransformer
from mflux.models.flux.variants.kontext.flux_kontext import Flux1Kontext
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.models.z_image import ZImage, ZImageTurbo
from mflux.models.z_image.model.text_encoder import ZImageTextEncoder
from mflux.utils.generated_image import GeneratedImage

flux = Flux1(model_config=ModelConfig.from_name("schnell"), quantize=4, lora_paths=["a.safetensors"])
assert_type(flux.transformer, FluxTransformer)
assert_type(flux.transformer.config.num_layers, int)
assert_type(flux.vae, AutoencoderKL)
flux.transformer = None
image = flux.generate_image(seed=1, prompt="x", num_inference_steps=4)
assert_type(image, GeneratedImage)
assert_type(image.image, PIL.Image.Image)
assert_type(image.save("a.png"), Path)
assert_type(Flux1Kontext.from_name("dev-kontext"), Flux1Kontext)
assert_type(ZImageTurbo(quantize=8).text_encoder, ZImageTextEncoder)
assert_type(mflux.load("z-image-turbo", quantize=4), ZImage)
assert_type(mflux.load("schnell").generate_image(1, "x"), GeneratedImage)
assert_type(mflux.load("qwen-image-edit").vae, AutoencoderWan)
assert_type(DepthPro().create_depth_map("a.png").depth_image, PIL.Image.Image)
FiboVLM(quantize=4)


def program(name: str) -> GeneratedImage:
    """With a model that is known by its name alone."""
    return mflux.load(name).generate_image(seed=1, prompt="x")


assert_type(ModelConfig.schnell(), ModelConfig)
Flux1(model_config=ModelConfig.krea_dev())

flux.generate_image(seed="1", prompt="x")  # type: ignore[arg-type]
flux.generate_image(seed=1, prompt="x", stepps=4)  # type: ignore[call-arg]
flux.transformers  # type: ignore[attr-defined]  # noqa: B018
mflux.load("schnell").text_encoder  # type: ignore[attr-defined]  # noqa: B018
ModelConfig.shnell()  # type: ignore[attr-defined]
mflux.lode("schnell")  # type: ignore[attr-defined]

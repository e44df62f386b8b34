"""Written by tools/stubs.py."""

import os
from typing import Any, Literal, overload

from mflux.models.anima.variants.txt2img.anima import Anima
from mflux.models.common.pipeline import Pipeline
from mflux.models.ernie_image.variants.txt2img.ernie_image import ErnieImage
from mflux.models.fibo.variants.edit.fibo_edit import FIBOEdit
from mflux.models.fibo.variants.txt2img.fibo import FIBO
from mflux.models.flux.variants.controlnet.flux_controlnet import Flux1Controlnet
from mflux.models.flux.variants.depth.flux_depth import Flux1Depth
from mflux.models.flux.variants.fill.flux_fill import Flux1Fill
from mflux.models.flux.variants.in_context.flux_in_context_fill import Flux1InContextFill
from mflux.models.flux.variants.kontext.flux_kontext import Flux1Kontext
from mflux.models.flux.variants.redux.flux_redux import Flux1Redux
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein
from mflux.models.flux3.variants.txt2img.flux3_klein import Flux3Klein
from mflux.models.ideogram4.variants.txt2img.ideogram4 import Ideogram4
from mflux.models.krea2.variants.controlnet.krea2_controlnet import Krea2Controlnet
from mflux.models.krea2.variants.txt2img.krea2 import Krea2
from mflux.models.qwen.variants.edit.qwen_image_edit import QwenImageEdit
from mflux.models.qwen.variants.txt2img.qwen_image import QwenImage
from mflux.models.seedvr2.variants.upscale.seedvr2 import SeedVR2
from mflux.models.z_image.variants.controlnet.z_image_turbo_controlnet import ZImageTurboControlnet
from mflux.models.z_image.variants.z_image import ZImage

__version__: str

@overload
def load(
    name: Literal[
        "demo",
        "schnell",
        "black-forest-labs/FLUX.1-schnell",
        "dev",
        "black-forest-labs/FLUX.1-dev",
        "krea-dev",
        "dev-krea",
        "black-forest-labs/FLUX.1-Krea-dev",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> Flux1: ...
@overload
def load(
    name: Literal[
        "dev-kontext",
        "black-forest-labs/FLUX.1-Kontext-dev",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> Flux1Kontext: ...
@overload
def load(
    name: Literal[
        "dev-fill",
        "black-forest-labs/FLUX.1-Fill-dev",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> Flux1Fill: ...
@overload
def load(
    name: Literal[
        "dev-fill-catvton",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> Flux1InContextFill: ...
@overload
def load(
    name: Literal[
        "dev-depth",
        "black-forest-labs/FLUX.1-Depth-dev",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> Flux1Depth: ...
@overload
def load(
    name: Literal[
        "dev-controlnet-canny",
        "schnell-controlnet-canny",
        "dev-controlnet-upscaler",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> Flux1Controlnet: ...
@overload
def load(
    name: Literal[
        "dev-redux",
        "black-forest-labs/FLUX.1-Redux-dev",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> Flux1Redux: ...
@overload
def load(
    name: Literal[
        "krea-2",
        "krea2",
        "krea/Krea-2-Turbo",
        "krea-2-raw",
        "krea2-raw",
        "krea/Krea-2-Raw",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> Krea2: ...
@overload
def load(
    name: Literal[
        "krea-2-controlnet-depth",
        "krea-2-controlnet",
        "krea2-controlnet",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> Krea2Controlnet: ...
@overload
def load(
    name: Literal[
        "flux2-klein-4b",
        "flux2-klein-4B",
        "flux2-klein",
        "klein-4b",
        "klein-4B",
        "black-forest-labs/FLUX.2-klein-4B",
        "flux2-klein-9b",
        "flux2-klein-9B",
        "klein-9b",
        "klein-9B",
        "black-forest-labs/FLUX.2-klein-9B",
        "flux2-klein-9b-kv",
        "flux2-klein-9B-kv",
        "flux2-klein-9b-KV",
        "klein-9b-kv",
        "klein-9B-kv",
        "black-forest-labs/FLUX.2-klein-9b-kv",
        "flux2-klein-base-4b",
        "flux2-klein-base-4B",
        "flux2-base-4b",
        "flux2-base-4B",
        "klein-base-4b",
        "klein-base-4B",
        "black-forest-labs/FLUX.2-klein-base-4B",
        "flux2-klein-base-9b",
        "flux2-klein-base-9B",
        "flux2-base-9b",
        "flux2-base-9B",
        "klein-base-9b",
        "klein-base-9B",
        "black-forest-labs/FLUX.2-klein-base-9B",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> Flux2Klein: ...
@overload
def load(
    name: Literal[
        "flux3-image-klein",
        "flux3-klein",
        "flux3",
        "flux-3-image-klein",
        "black-forest-labs/flux-3-image-klein",
        "flux3-image-klein-base",
        "flux3-klein-base",
        "flux3-base",
        "flux-3-image-klein-base",
        "black-forest-labs/flux-3-image-klein-base",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> Flux3Klein: ...
@overload
def load(
    name: Literal[
        "qwen-image",
        "qwen",
        "qwen-image-2512",
        "qwen-2512",
        "Qwen/Qwen-Image-2512",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> QwenImage: ...
@overload
def load(
    name: Literal[
        "qwen-image-edit",
        "qwen-edit",
        "qwen-edit-plus",
        "qwen-edit-2509",
        "Qwen/Qwen-Image-Edit-2509",
        "qwen-image-edit-2511",
        "qwen-edit-2511",
        "Qwen/Qwen-Image-Edit-2511",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> QwenImageEdit: ...
@overload
def load(
    name: Literal[
        "fibo",
        "briaai/FIBO",
        "fibo-lite",
        "fibo_lite",
        "briaai/Fibo-lite",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> FIBO: ...
@overload
def load(
    name: Literal[
        "fibo-edit",
        "fiboedit",
        "briaai/Fibo-Edit",
        "fibo-edit-rmbg",
        "fiboedit-rmbg",
        "briaai/Fibo-Edit-RMBG",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> FIBOEdit: ...
@overload
def load(
    name: Literal[
        "z-image-turbo",
        "zimage-turbo",
        "Tongyi-MAI/Z-Image-Turbo",
        "z-image",
        "zimage",
        "Tongyi-MAI/Z-Image",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> ZImage: ...
@overload
def load(
    name: Literal[
        "z-image-turbo-controlnet-union-2.1",
        "z-image-controlnet-union-2.1",
        "z-image-controlnet",
        "z-image-turbo-controlnet",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> ZImageTurboControlnet: ...
@overload
def load(
    name: Literal[
        "seedvr2-3b",
        "seedvr2",
        "numz/SeedVR2_comfyUI",
        "seedvr2-7b",
        "seedvr2-7B",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> SeedVR2: ...
@overload
def load(
    name: Literal[
        "ernie-image",
        "baidu/ERNIE-Image",
        "ernie-image-turbo",
        "baidu/ERNIE-Image-Turbo",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> ErnieImage: ...
@overload
def load(
    name: Literal[
        "ideogram-4-fp8",
        "ideogram4-fp8",
        "ideogram4",
        "ideogram-4",
        "ideogram",
        "ideogram-ai/ideogram-4-fp8",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> Ideogram4: ...
@overload
def load(
    name: Literal[
        "anima-turbo",
        "anima",
        "circlestone-labs/Anima",
        "anima-aesthetic",
        "anima-base",
    ],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> Anima: ...
@overload
def load(
    name: str | os.PathLike[str],
    *,
    quantize: int | None = None,
    model_path: str | os.PathLike[str] | None = None,
    lora_paths: list[str] | None = None,
    lora_scales: list[float] | None = None,
    base_model: str | None = None,
    **settings: Any,
) -> Pipeline: ...

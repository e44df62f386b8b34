"""Z-Image-Turbo with a Union ControlNet: pictures after the edges or depths of others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image

from mflux.backend import mx
from mflux.checkpoints.published import PublishedFolder
from mflux.errors import NotBuiltError, UsageError
from mflux.hub import fetch_file
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.controls.canny import canny
from mflux.models.common.family import Component
from mflux.models.common.memory import LazyComponent, give_back_memory
from mflux.models.common.networks.modulation import Known
from mflux.models.common.networks.once import Once
from mflux.models.z_image.family import COMPONENTS, CONTROLNET
from mflux.models.z_image.latent_creator import ZImageLatentCreator
from mflux.models.z_image.layouts import LAYOUT
from mflux.models.z_image.model.controlnet import ZImageControlNet
from mflux.models.z_image.pipeline import ZImagePipeline
from mflux.models.z_image.variants.controlnet.control_types import ControlSpec, ControlType
from mflux.utils import values
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.image_util import ImageUtil
from mflux.utils.paths import recorded_file

BUILT = (ControlType.canny, ControlType.depth)


class ZImageTurboControlnet(ZImagePipeline):
    """Z-Image-Turbo and a Union ControlNet; see `ZImagePipeline`.

    The ControlNet is that of the model's folder (`controlnet/`), or else the file in the repository
    `model_config.controlnet_model` that is called like it.
    """

    components = (*COMPONENTS, CONTROLNET)
    default_model = "z-image-turbo-controlnet-union-2.1"
    controlnet: LazyComponent[ZImageControlNet]

    def __init__(
        self,
        quantize: int | None = None,
        model_path: str | None = None,
        lora_paths: list[str] | None = None,
        lora_scales: list[float] | None = None,
        model_config: ModelConfig | None = None,
        float32: bool = False,
        *,
        bake_lora: bool = True,
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
            float32,
            text_encoder_paths=text_encoder_paths,
            vae_path=vae_path,
            compute_precision=compute_precision,
        )

    def folder_of(self, component: Component) -> PublishedFolder:
        if component.name != "controlnet" or self.folder.has("controlnet"):
            return super().folder_of(component)
        if component.name not in self._folders:
            source = self.registered.controlnet_model
            if source is None:
                raise UsageError(
                    f"{self.registered.model_name} comes without a ControlNet: use z-image-controlnet, or a folder "
                    "with a controlnet folder in it"
                )
            name, _, revision = source.partition("@")
            # The repository holds several ControlNets; this one is called like it.
            file = fetch_file(name, f"{name.rpartition('/')[2]}.safetensors", revision or None)
            self._folders[component.name] = PublishedFolder(file.parent, LAYOUT, files={"controlnet": file})
        return self._folders[component.name]

    def generate_image(
        self,
        *,
        seed: int,
        prompt: str,
        controls: Sequence[ControlSpec],
        num_inference_steps: int = 8,
        height: int | None = 1024,
        width: int | None = 1024,
        controlnet_strength: float = 0.8,
        scheduler: str | None = None,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Draw one picture after others.

        Args:
            seed, prompt, num_inference_steps, scheduler: as for `ZImage.generate_image`.
            controls: what to draw after, one or more; what they say is added up. Pictures are brought to the size that
                is drawn, whatever their shape.
            height, width: in pixels, rounded down to multiples of 16.
            controlnet_strength: how much all of them count; the ControlNet's authors advise 0.65 to 1.
            step_cache_ratio, cfg_end: see `Pipeline.settings`.

        Raises:
            NotBuiltError: a control of a type that is not built.
            MfluxError: sizes, steps, pictures or weights are unusable; the message says which.
            StopImageGenerationException: Ctrl-C, or a callback, stopped it.
        """
        check_controls(controls)
        strength = values.real(controlnet_strength, "controlnet_strength")
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            guidance=0.0,
            scheduler=scheduler,
            controlnet_strength=strength,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )

        # 1. Encode the prompt, and what the control images show
        (encoded,) = self.encode_prompts(prompt)
        images = [control_image(control, config.width, config.height) for control in controls]
        latents_of_controls = [
            ZImageLatentCreator.unpack_latents(self.encode_pixels(ImageUtil.to_array(image))) for image in images
        ]

        # 2. Start from noise
        latents = ZImageLatentCreator.create_noise(seed, config.height, config.width)

        # 3. Denoise
        def hints(latents: mx.array, sigma: mx.array, known: Known | None, once: Once) -> dict[int, mx.array]:
            summed: dict[int, mx.array] = {}
            for control, control_latents in zip(controls, latents_of_controls, strict=True):
                found = self.hints(latents, sigma, encoded, control_latents, strength * control.strength, known, once)
                for place, hint in found.items():
                    summed[place] = summed[place] + hint if place in summed else hint
            return summed

        velocity = self.predictor(config, encoded, hints=hints, controlnet=self.controlnet)
        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt, control_images=images)

        # 4. Decode
        return self.make_image(
            config,
            latents,
            seed=seed,
            prompt=prompt,
            controlnet_image_path=controls[0].image_path,
            parameters=self.parameters_of(scheduler) | {"controls": [as_text(control) for control in controls]},
        )

    def hints(
        self,
        latents: mx.array,
        sigma: mx.array,
        prompt_embeds: mx.array,
        control: mx.array,
        strength: float,
        known: Known | None = None,
        once: Once | None = None,
    ) -> dict[int, mx.array]:
        """What the ControlNet adds after layers of the transformer, by their numbers."""
        dtype, timestep = self.inputs(sigma, prompt_embeds)
        return self.controlnet(
            self.own_transformer(),
            latents.astype(dtype),
            control=control,
            timestep=timestep,
            prompt_embeds=prompt_embeds,
            strength=strength,
            known=known,
            once=once,
        )


def check_controls(controls: Sequence[ControlSpec]) -> None:
    """
    Raises:
        UsageError: there is none.
        NotBuiltError: one is of a type that is not built.
    """
    if not controls:
        raise UsageError("there is nothing to draw after: give a control, as canny:photo.jpg")
    for control in controls:
        if control.type not in BUILT:
            raise NotBuiltError(
                f"the control {ControlType(control.type).value} is not built yet in this version: there are "
                f"{' and '.join(kind.value for kind in BUILT)}"
            )


def control_image(control: ControlSpec, width: int, height: int) -> PIL.Image.Image:
    """What of a picture is drawn after, at the size of the drawing.

    Raises:
        ImageError: it is no picture that can be read.
    """
    image = ImageUtil.scale_to_dimensions(ImageUtil.load_image(control.image_path), width, height)
    if control.type == ControlType.canny:
        return PIL.Image.fromarray(canny(np.asarray(image.convert("L")))).convert("RGB")
    return depth_image(image)


def depth_image(image: PIL.Image.Image) -> PIL.Image.Image:
    """How far everything on a picture is, from Depth Pro, which is loaded for it and let go."""
    from mflux.models.common.controls.depth_pro.depth_pro import DepthPro

    depth = DepthPro().depth_of(image.convert("RGB")).depth_image.convert("RGB")
    give_back_memory()
    return depth


def as_text(control: ControlSpec) -> str:
    """As `--control` takes it, without the folders of this machine: "canny:photo.jpg:0.8"."""
    return f"{ControlType(control.type).value}:{recorded_file(control.image_path)}:{control.strength:g}"

"""Krea 2 Turbo with its depth ControlNet: a prompt and a depth map to an image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image

from mflux.backend import mx
from mflux.checkpoints.loading import load_component
from mflux.checkpoints.published import PublishedFolder
from mflux.errors import CheckpointError, UsageError
from mflux.hub import fetch_only_file
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.controls.depth import FindsDepth
from mflux.models.common.family import Component
from mflux.models.common.latent_creator.patches import PatchLatentCreator
from mflux.models.common.lora.reading import Loras
from mflux.models.common.memory import LazyComponent
from mflux.models.common.networks.autoencoders import tiling
from mflux.models.krea2.family import CONTROL_COMPONENTS
from mflux.models.krea2.latent_creator.krea2_latent_creator import Krea2LatentCreator
from mflux.models.krea2.layouts import LAYOUT
from mflux.models.krea2.model.depth_control import DepthControl, Krea2ControlTransformer, WithEntrance, adapters
from mflux.models.krea2.pipeline import Krea2Pipeline
from mflux.utils import values
from mflux.utils.generated_image import GeneratedImage
from mflux.utils.image_util import ImageUtil
from mflux.utils.paths import is_file, is_folder, user_path


class Krea2Controlnet(Krea2Pipeline, FindsDepth):
    """Krea 2 with its depth ControlNet; see `Krea2Pipeline` for the arguments that all have.

    Args:
        controlnet_path: the ControlNet: a file, a folder or repository that holds one; that of the model's folder
            (`controlnet/`) by default, or else the published one.
        controlnet_strength: how much its changes to the blocks count. Its entrance counts in full, so that 0 is not
            Krea 2 without it.
    """

    components = CONTROL_COMPONENTS
    default_model = "krea-2-controlnet-depth"
    transformer: LazyComponent[Krea2ControlTransformer]
    controlnet: LazyComponent[DepthControl]
    controlnet_path: str | None = None
    controlnet_strength: float = 1.0

    def __init__(
        self,
        quantize: int | None = None,
        model_path: str | None = None,
        model_config: ModelConfig | None = None,
        controlnet_path: str | None = None,
        controlnet_strength: float = 1.0,
        lora_paths: list[str] | None = None,
        lora_scales: list[float] | None = None,
        bake_lora: bool = True,
        *,
        text_encoder_paths: list[str] | None = None,
        vae_path: str | None = None,
    ):
        self.controlnet_path = controlnet_path
        self.controlnet_strength = values.real(controlnet_strength, "controlnet_strength")
        super().__init__(
            quantize,
            model_path,
            lora_paths,
            lora_scales,
            bake_lora,
            model_config,
            text_encoder_paths=text_encoder_paths,
            vae_path=vae_path,
        )

    # ---- the ControlNet

    def check_folder(self) -> None:
        super().check_folder()
        part = self.component("controlnet")
        folder = self.folder_of(part)
        config, source = self.configuration("controlnet"), folder.files.get("controlnet", folder.root / part.folder)
        if wrong := config.misfit(self.configuration("transformer")):
            raise CheckpointError(f"{source} is not a ControlNet of this model: {wrong}")
        # Names and shapes, before anything large is loaded.
        load_component(
            DepthControl, source, config=folder.config(part.folder), tensors=folder.tensors(part.folder), read=False
        )

    def folder_of(self, component: Component) -> PublishedFolder:
        if component.name != "controlnet":
            return super().folder_of(component)
        if component.name not in self._folders:
            if self.controlnet_path is None and self.folder.has(component.folder):
                return self.folder
            source = self.controlnet_path or self.registered.controlnet_model
            if source is None:
                raise UsageError(
                    f"{self.registered.model_name} comes without a ControlNet: say which with controlnet_path "
                    "(--controlnet-path), or use krea-2-controlnet"
                )
            file = control_file(source)
            self._folders[component.name] = PublishedFolder(file.parent, LAYOUT, files={component.folder: file})
            self._sources[component.folder] = source
        return self._folders[component.name]

    def tensors_of(self, component: Component, *, to_save: bool) -> Mapping[str, mx.array]:
        tensors = super().tensors_of(component, to_save=to_save)
        if component.name != "transformer" or to_save:
            return tensors
        return WithEntrance(tensors, super().tensors_of(self.component("controlnet"), to_save=False))

    def loras_of(self, component: Component, *, to_save: bool) -> Loras | None:
        if component.name != "transformer" or to_save:
            return super().loras_of(component, to_save=to_save)
        part = self.component("controlnet")
        place = self.folder_of(part)
        source = place.files.get(part.folder, place.root / part.folder)
        control = super().tensors_of(part, to_save=False)
        changes = adapters(control, self.configuration("controlnet"), self.controlnet_strength, source)
        return (self._loras or Loras.none()).behind(component.folder, changes)

    # ---- one image

    def generate_image(
        self,
        seed: int,
        prompt: str,
        num_inference_steps: int = 8,
        height: int | None = 1024,
        width: int | None = 1024,
        guidance: float = 1.0,
        negative_prompt: str | None = None,
        image_path: Path | str | None = None,
        depth_image_path: Path | str | None = None,
        scheduler: str | None = None,
        *,
        step_cache_ratio: float | None = None,
        cfg_end: float | None = None,
    ) -> GeneratedImage:
        """Generate one image; arguments and errors are those of `Krea2.generate_image` but for these.

        Args:
            image_path: an image whose depth Depth Pro finds; it has no other part in the result.
            depth_image_path: a depth map, white where it is near; with it Depth Pro is not loaded. Stretched to the
                size of the image.

        Returns:
            The image; `depth_image` is Depth Pro's map, None where one was given.
        """
        if depth_image_path is None and image_path is None:
            raise UsageError(
                "this model generates after depth: use image_path (--image-path) for an image whose depth is found, or "
                "depth_image_path (--depth-image-path) for a depth map"
            )
        config = self.settings(
            seed=seed,
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            guidance=guidance,
            depth_image_path=depth_image_path,
            controlnet_strength=self.controlnet_strength,
            scheduler=scheduler,
            step_cache_ratio=step_cache_ratio,
            cfg_end=cfg_end,
        )
        is_guided = self.is_guided(config.guidance)

        # 1. Encode the prompts, and find the depth
        encoded = self.encode_prompts(*([prompt, negative_prompt or ""] if is_guided else [prompt]))
        found = self.find_depth(image_path) if depth_image_path is None and image_path is not None else None
        shown = ImageUtil.load_image(found or depth_image_path or "")
        control = self.encode_depth(shown, config.height, config.width)

        # 2. Start from noise
        latents = Krea2LatentCreator.create_noise(seed, config.height, config.width)

        # 3. Denoise
        velocity = self.predictor(config, *encoded, control=control.astype(encoded[0].dtype))
        latents = self.denoise(config, latents, velocity, seed=seed, prompt=prompt, depth_image=found or shown)
        del velocity

        # 4. Decode
        about: dict[str, Any] = {"controlnet_image_path": image_path, "depth_image_path": depth_image_path}
        negative_prompt = negative_prompt if is_guided else None
        image = self.make_image(config, latents, seed=seed, prompt=prompt, negative_prompt=negative_prompt, **about)
        image.depth_image = found
        return image

    def encode_depth(self, depth: PIL.Image.Image, height: int, width: int) -> mx.array:
        """A depth map's tokens (1, L, 64): always of the whole map, as the ControlNet was trained."""
        resized = ImageUtil.scale_to_dimensions(depth, width, height)
        latents = Krea2LatentCreator.pack_latents(tiling.encode(self.vae, ImageUtil.to_array(resized), None))
        tokens = PatchLatentCreator.pack_latents(latents.astype(mx.float32), height, width)
        mx.eval(tokens)
        return tokens


def control_file(source: str) -> Path:
    """The ControlNet's file: itself, the only one of a folder, or of a repository.

    Raises:
        CheckpointError: a folder holds none, or several.
        DownloadError: a repository cannot be had.
    """
    path = user_path(source)
    if is_file(path):
        return path
    if not is_folder(path):
        return fetch_only_file(source, ".safetensors")
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(f"{path} holds {len(found)} .safetensors files: name the ControlNet's own")
    return found[0]

"""A picture and everything that is needed to make it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux.utils.atomic_files import write_atomically
from mflux.utils.paths import read_bounded, recorded_source
from mflux.utils.picture_files import save_picture
from mflux.utils.settings import settings_of
from mflux.utils.strict_json import NotJSON, parse

if TYPE_CHECKING:
    import PIL.Image

    from mflux.backend import mx
    from mflux.models.common.config import ModelConfig

# What a picture made from another one keeps of that one's settings, as "original_…".
_CARRIED = ("seed", "steps", "guidance", "model", "lora_paths", "lora_scales", "quantize")

# Of a prompt in JSON beside an image.
_LARGEST_PROMPT = 1 << 20


class GeneratedImage:
    """The result of `generate_image`: `.image` is the PIL picture, `.save` writes it with its settings."""

    # The folder or repository that the weights were taken from, None for a built-in model's own; set by the pipeline.
    model_path: str | None = None
    text_encoder_paths: list[str] | None = None
    vae_path: str | None = None
    # Whether the prompt, a JSON object, goes beside the picture as `name.json`; set by the pipeline.
    prompt_beside: bool = False
    # What was found in the source image and generated after, where that is so; set by the pipeline.
    canny_image: PIL.Image.Image | None = None
    depth_image: PIL.Image.Image | None = None

    def __init__(
        self,
        image: PIL.Image.Image,
        model_config: ModelConfig,
        seed: int,
        prompt: str,
        steps: int,
        guidance: float | None,
        precision: mx.Dtype,
        quantization: int | None,
        generation_time: float,
        lora_paths: list[str] | None = None,
        lora_scales: list[float] | None = None,
        height: int | None = None,
        width: int | None = None,
        controlnet_image_path: str | Path | None = None,
        controlnet_strength: float | None = None,
        image_path: str | Path | None = None,
        image_paths: list[str] | list[Path] | None = None,
        image_strength: float | None = None,
        masked_image_path: str | Path | None = None,
        depth_image_path: str | Path | None = None,
        redux_image_paths: list[str] | list[Path] | None = None,
        redux_image_strengths: list[float] | None = None,
        concept_heatmap: Any | None = None,
        negative_prompt: str | None = None,
        init_metadata: dict | None = None,
        pid_decode: bool = False,
        pid_degrade_sigma: float = 0.0,
        generation_parameters: dict | None = None,
    ):
        self.image = image
        self.model_config = model_config
        self.seed = seed
        self.prompt = prompt
        self.steps = steps
        self.guidance = guidance
        self.precision = precision
        self.quantization = quantization
        self.generation_time = generation_time
        self.lora_paths = lora_paths
        self.lora_scales = lora_scales
        self.height = height
        self.width = width
        self.controlnet_image_path = controlnet_image_path
        self.controlnet_strength = controlnet_strength
        self.image_path = image_path
        self.image_paths = image_paths
        self.image_strength = image_strength
        self.masked_image_path = masked_image_path
        self.depth_image_path = depth_image_path
        self.redux_image_paths = redux_image_paths
        self.redux_image_strengths = redux_image_strengths
        self.concept_heatmap = concept_heatmap
        self.negative_prompt = negative_prompt
        self.init_metadata = init_metadata
        self.pid_decode = pid_decode
        self.pid_degrade_sigma = pid_degrade_sigma
        self.generation_parameters = generation_parameters or {}

    def get_right_half(self) -> GeneratedImage:
        """The same settings with the right half of the picture, for side-by-side models."""
        width, height = self.image.size
        half = object.__new__(type(self))
        half.__dict__.update(self.__dict__)
        half.image = self.image.crop((width // 2, 0, width, height))
        return half

    def save(
        self,
        path: str | Path,
        export_json_metadata: bool = False,
        overwrite: bool = False,
        embed_metadata: bool = True,
    ) -> Path:
        """Write the picture; see `ImageUtil.save_image` for names, settings and errors.

        Returns:
            Where it went.
        """
        return self.save_with_image(path, self.image, export_json_metadata, overwrite, embed_metadata)

    def save_with_image(
        self,
        path: str | Path,
        pixel_image: PIL.Image.Image,
        export_json_metadata: bool = False,
        overwrite: bool = False,
        embed_metadata: bool = True,
    ) -> Path:
        """Write another picture with this one's settings."""
        saved = save_picture(
            pixel_image,
            path,
            self._get_metadata(),
            export_json_metadata=export_json_metadata,
            overwrite=overwrite,
            embed_metadata=embed_metadata,
        )
        if self.prompt_beside:
            self._save_prompt(saved.with_suffix(".json"), overwrite)
        return saved

    def _save_prompt(self, path: Path, overwrite: bool) -> None:
        """Write the prompt for a person to change, unless it was taken from this very file."""
        prompt = parse(self.prompt)
        try:
            if parse(read_bounded(path, _LARGEST_PROMPT)) == prompt:
                return
        except (OSError, NotJSON):
            pass
        text = json.dumps(prompt, indent=2, ensure_ascii=False)
        # Half a character, which JSON may escape, is no UTF-8.
        write_atomically(path, lambda file: file.write(text.encode(errors="replace")), overwrite=overwrite)

    def save_with_heatmap(
        self,
        path: str | Path,
        export_json_metadata: bool = False,
        overwrite: bool = False,
        embed_metadata: bool = True,
    ) -> Path:
        """Write the picture and, if there is one, its concept heatmap as `name_heatmap.png`."""
        saved = self.save(path, export_json_metadata, overwrite, embed_metadata)
        if self.concept_heatmap:
            beside = saved.with_stem(saved.stem + "_heatmap")
            self.save_concept_heatmap(beside, export_json_metadata, overwrite, embed_metadata)
        return saved

    def save_concept_heatmap(
        self,
        path: str | Path,
        export_json_metadata: bool = False,
        overwrite: bool = False,
        embed_metadata: bool = True,
    ) -> Path:
        """Write the concept heatmap.

        Raises:
            ValueError: the picture has none.
        """
        if not self.concept_heatmap:
            raise ValueError("this picture has no concept heatmap")
        return save_picture(
            self.concept_heatmap.image,
            path,
            self.concept_heatmap.get_metadata(),
            export_json_metadata=export_json_metadata,
            overwrite=overwrite,
            embed_metadata=embed_metadata,
        )

    def settings(self) -> dict[str, Any]:
        """What is written into its file."""
        return self._get_metadata()

    def _get_metadata(self) -> dict[str, Any]:
        """Everything, with models, LoRAs and pictures named as `mflux.utils.paths` does: a picture goes out to others,
        and the folders that it was made in do not."""
        settings = settings_of(self)
        if self.pid_decode:
            settings |= {"pid_decode": True, "pid_degrade_sigma": self.pid_degrade_sigma}
        if taken := settings.keys() & self.generation_parameters.keys():
            raise ValueError(f"generation_parameters may not replace {', '.join(sorted(taken))}")
        return settings | self.generation_parameters | self._of_the_source(settings)

    def _of_the_source(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What to keep of the settings of the picture that this one was made from."""
        source = (self.init_metadata or {}).get("exif") or {}
        kept = {name: source[name] for name in ("prompt", "negative_prompt") if source.get(name) and not settings[name]}
        for side, value in (("width", self.width), ("height", self.height)):
            if source.get(side) and source[side] != value:
                kept[f"original_{side}"] = source[side]
        return kept | {f"original_{name}": _carried(source[name]) for name in _CARRIED if source.get(name)}


def _carried(value: Any) -> Any:
    """A setting of an earlier picture; mflux 0.24 wrote whole paths."""
    if isinstance(value, list):
        return [_carried(item) for item in value]
    return recorded_source(value) if isinstance(value, str) else value

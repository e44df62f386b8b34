"""What clients send, JSON or a form, as arguments of `Engine.submit`; errors as they are answered.

A request's fields are the settings that images record, a few other spellings of them, and what OpenAI's clients send
beside. Nothing of a request is ever a path, and nothing that it names is fetched.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mflux.cli.terminal import nearest
from mflux.errors import ImageError, MfluxError, UsageError
from mflux.models.common.lora.library import library, library_folders
from mflux.serve.engine import QueueFullError, StoppingError
from mflux.serve.jobs import FORMATS, JobError
from mflux.serve.models import MOST_IMAGES, ModelNotFoundError, Served, UnsupportedError
from mflux.text import one_line, shown, some
from mflux.utils.given_image import GivenImage
from mflux.utils.scale_factor import GRID, LARGEST
from mflux.utils.strict_json import NotJSON, parse

if TYPE_CHECKING:
    from mflux.serve.engine import Engine

LONGEST_PROMPT = 32_000
MOST_IMAGES_A_REQUEST = 10
MOST_PARTIAL_IMAGES = 3
MOST_PREVIEWS = 64

# Other spellings, as other programs have them.
SPELLINGS = {"num_inference_steps": "steps", "guidance_scale": "guidance", "image[]": "images", "image": "images"}
# Taken, and without an effect: OpenAI's own affairs.
WITHOUT_EFFECT = ("user", "safety_identifier", "moderation", "quality", "style", "complexity", "input_fidelity")
# What clients have built in stands for the default model.
_OPENAI_MODELS = re.compile(r"(gpt-image|chatgpt-image|dall-e)\b.*")
# Fields beside the model's settings.
_FIELDS = (
    "prompt", "model", "n", "size", "seed", "loras", "images", "mask", "image_strength", "background", "output_format",
    "output_compression", "response_format", "stream", "partial_images", "previews", *WITHOUT_EFFECT,
)  # fmt: skip
# Of a form, where all is text.
_TEXTS = frozenset(
    {"prompt", "negative_prompt", "model", "size", "output_format", "response_format", "background", "scheduler"}
) | frozenset(WITHOUT_EFFECT)
_DATA_URL = re.compile(r"data:image/[\w.+-]+(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)


class RequestError(MfluxError):
    """A request that is answered with an error.

    Attributes:
        status: HTTP's.
        kind: OpenAI's `type`.
        param: the field at fault.
        code: what it is, for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = "invalid_value",
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers or {})

    def as_json(self) -> dict[str, Any]:
        message = one_line(self, 1000)
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}


_RETRY_NOT = {"x-should-retry": "false"}


def answer_of(error: Exception) -> RequestError:
    """How an error is answered."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ModelNotFoundError):
        return RequestError(str(error), status=404, kind="not_found_error", param="model", code="model_not_found")
    if isinstance(error, UnsupportedError):
        return RequestError(str(error), param=error.setting, code="unsupported")
    if isinstance(error, QueueFullError):
        headers = {"retry-after": str(error.retry_after)}
        return RequestError(str(error), status=429, kind="rate_limit_error", code="queue_full", headers=headers)
    if isinstance(error, StoppingError) or (isinstance(error, JobError) and error.kind == "stopping"):
        headers = {"retry-after": "5"}
        return RequestError(str(error), status=503, kind="server_error", code="stopping", headers=headers)
    if isinstance(error, JobError) and error.kind == "cancelled":
        return RequestError(str(error), status=410, kind="cancelled_error", code="cancelled")
    if isinstance(error, ImageError):
        return RequestError(str(error), param="image", code="invalid_image")
    if isinstance(error, UsageError) or (isinstance(error, JobError) and error.kind == "invalid"):
        return RequestError(str(error), param=_named_in(str(error)))
    message = str(error) if isinstance(error, MfluxError) else "the server failed: its log has more"
    return RequestError(message, status=500, kind="server_error", code="failed", headers=_RETRY_NOT)


def _named_in(message: str) -> str | None:
    """The field that a message of a command is about: it begins with its name, or names the option."""
    name = message.partition(":")[0]
    if re.fullmatch(r"[a-z_]+", name):
        return name
    found = re.match(r"the ([a-z]+) '", message) or re.search(r"--([a-z][a-z-]+)", message)
    return found[1].replace("-", "_") if found else None


@dataclass(frozen=True)
class ImageRequest:
    """A request whose fields have been read.

    Attributes:
        arguments: of `Engine.submit`.
        response_format: "b64_json" or "url".
        partial_images: how many of each image are streamed.
    """

    arguments: dict[str, Any] = field(repr=False)
    response_format: str = "b64_json"
    stream: bool = False
    partial_images: int = 0


@dataclass(frozen=True)
class Upload:
    """A file of a form."""

    name: str
    data: bytes = field(repr=False)


def parsed(body: bytes) -> dict[str, Any]:
    """A body of JSON.

    Raises:
        RequestError: it is none, or no object.
    """
    try:
        found = parse(body)
    except NotJSON as error:
        raise RequestError(f"the request's body {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise RequestError("the request's body is no JSON object: send {…}", code="invalid_json")
    return found


def of_form(fields: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A form's texts as what they stand for.

    Raises:
        RequestError: one is there twice.
    """
    found: dict[str, Any] = {}
    for name, text in fields:
        if name in found:
            raise RequestError(f"{shown(name, 60)} is in the form twice: send it once", param=shown(name, 60))
        found[name] = text
        if name not in _TEXTS:
            with suppress(NotJSON):
                found[name] = parse(text)
    return found


def read(
    values: Mapping[str, Any],
    engine: Engine,
    uploads: Sequence[Upload] = (),
    *,
    most_pixels: int,
    is_job: bool = False,
    needs_image: bool = False,
) -> ImageRequest:
    """Everything of a request, checked as far as that goes without the model.

    Args:
        uploads: the form's files.
        most_pixels: of a source image.
        is_job: whether it may ask for previews, and not for a stream.
        needs_image: whether it makes no sense without a source image.

    Raises:
        RequestError: a field is unknown, missing, or makes no sense.
        UsageError: likewise, found by what all surfaces share.
    """
    fields = _spelled(values)
    model = _model(fields, engine)
    known = [*_FIELDS, *model.fields]
    for name in fields:
        if name not in known:
            raise RequestError(
                f"{shown(name, 60)!r} is no field of this request{nearest(name, known)}",
                param=shown(name, 60),
                code="unknown_field",
            )
    if not is_job and "previews" in fields:
        raise RequestError(
            "previews are for /v1/jobs: stream partial_images here", param="previews", code="unsupported"
        )
    if is_job and fields.keys() & {"stream", "response_format", "partial_images"}:
        name = next(iter(fields.keys() & {"stream", "response_format", "partial_images"}))
        raise RequestError(f"{name} has no meaning for a job: leave it out", param=name, code="unsupported")
    images, mask = _images(fields, uploads, most_pixels)
    if needs_image and not images:
        raise RequestError("there is no image to edit: send one as image", param="image", code="missing")
    of_model = (model.fields | {"image_strength"}) - {"prompt"}
    settings = {name: value for name, value in fields.items() if name in of_model} | _size(fields)
    if "." in str(settings.get("scheduler", "")):
        raise RequestError("scheduler is a name, without dots: nothing is imported for a request", param="scheduler")
    background = _one_of(fields, "background", ("auto", "opaque", "transparent"), "auto")
    if background == "transparent":
        raise RequestError(
            "images have no transparent background here: leave it out", param="background", code="unsupported"
        )
    output_format = _one_of(fields, "output_format", tuple(FORMATS), "png")
    stream = _switch(fields, "stream")
    partial = _whole(fields, "partial_images", 0, MOST_PARTIAL_IMAGES, 0) or 0
    if partial and not stream:
        raise RequestError("partial_images are streamed: send stream: true as well", param="partial_images")
    n = _whole(fields, "n", 1, MOST_IMAGES_A_REQUEST, 1)
    previews: int | None = partial * n
    if is_job:
        previews = None if fields.get("previews") == "auto" else _whole(fields, "previews", 0, MOST_PREVIEWS, 0)
    return ImageRequest(
        {
            "model": model.id,
            "prompt": _prompt(fields),
            "n": n,
            "images": images,
            "mask": mask,
            "loras": _loras(fields, engine),
            "output_format": output_format,
            "quality": _whole(fields, "output_compression", 0, 100, None),
            "previews": previews,
            "weight": sum(
                len(one.image) for one in [*images, mask] if one is not None and isinstance(one.image, bytes)
            ),
            **settings,
        },
        _one_of(fields, "response_format", ("b64_json", "url"), "b64_json"),
        stream,
        partial,
    )


def _spelled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by our names; what is null is not said."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        ours = SPELLINGS.get(name, name)
        if ours in fields and fields[ours] != value:
            raise RequestError(f"{shown(name, 60)} says what {ours} says, with another value: send one", param=name)
        fields[ours] = value
    return fields


def _model(fields: Mapping[str, Any], engine: Engine) -> Served:
    name = fields.get("model")
    if name is None or name == "":
        return engine.default
    if not isinstance(name, str):
        raise RequestError(f"model is {shown(name, 60)}, which is no name", param="model")
    try:
        return engine.model(name)
    except ModelNotFoundError:
        if _OPENAI_MODELS.fullmatch(name):
            return engine.default
        raise


def _prompt(fields: Mapping[str, Any]) -> str:
    prompt = fields.get("prompt")
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        raise RequestError("there is no prompt: say what the image shows", param="prompt", code="missing")
    if not isinstance(prompt, str):
        raise RequestError(f"prompt is {shown(prompt, 60)}, which is no text", param="prompt")
    if len(prompt) > LONGEST_PROMPT:
        raise RequestError(
            f"the prompt has {len(prompt):,} characters, and {LONGEST_PROMPT:,} is the most: cut it", param="prompt"
        )
    # Half of a surrogate pair, which JSON can spell, is none either.
    if "\0" in prompt or prompt != prompt.encode(errors="replace").decode():
        raise RequestError("the prompt holds what no text does, such as a zero byte: leave it out", param="prompt")
    return prompt


def _size(fields: Mapping[str, Any]) -> dict[str, int]:
    sides = {name: _side(fields[name], name) for name in ("width", "height") if name in fields}
    said = fields.get("size", "auto")
    if said == "auto":
        if len(sides) == 1:
            missing = "height" if "width" in sides else "width"
            raise RequestError(f"a size has two sides: send {missing} as well", param=missing, code="missing")
        return sides
    found = re.fullmatch(r"(\d{1,6})\s*[xX×]\s*(\d{1,6})", said) if isinstance(said, str) else None
    if found is None:
        raise RequestError(f"size is {shown(said, 40)!r}: it is WIDTHxHEIGHT, as in 1024x768, or auto", param="size")
    size = {"width": _side(int(found[1]), "size"), "height": _side(int(found[2]), "size")}
    if any(size[name] != value for name, value in sides.items()):
        raise RequestError("size and width or height say different things: send one of them", param="size")
    return size


def _side(value: Any, param: str) -> int:
    if type(value) is not int:
        raise RequestError(f"{param} is {shown(value, 40)}, which is no number of pixels", param=param)
    if not GRID <= value <= LARGEST:
        raise RequestError(
            f"a side of {shown(value, 40)} pixels is none that an image has: {GRID} to {LARGEST}", param=param
        )
    if value % GRID:
        near = round(value / GRID) * GRID
        raise RequestError(f"a side of {value} is not a multiple of {GRID}: {near} is near", param=param)
    return value


def _whole(fields: Mapping[str, Any], name: str, least: int, most: int, default: Any) -> Any:
    value = fields.get(name, default)
    if value is default:
        return default
    if type(value) is not int or not least <= value <= most:
        raise RequestError(f"{name} is {shown(value, 40)}: it is a whole number from {least} to {most}", param=name)
    return value


def _one_of(fields: Mapping[str, Any], name: str, known: Sequence[str], default: str) -> str:
    value = fields.get(name, default)
    if value not in known:
        raise RequestError(f"{name} is {shown(value, 40)}: it is one of {', '.join(known)}", param=name)
    return str(value)


def _switch(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {shown(value, 40)}, which is neither true nor false", param=name)
    return value


def _loras(fields: Mapping[str, Any], engine: Engine) -> list[tuple[str, float]] | None:
    said = fields.get("loras")
    if said is None:
        return None
    if not isinstance(said, list):
        raise RequestError('loras is no list: send [{"name": …, "scale": 1.0}]', param="loras")
    known = lora_names(engine)
    found = []
    for one in said:
        extra = set(one) - {"name", "scale"} if isinstance(one, dict) else {one if isinstance(one, str) else "?"}
        if extra or not isinstance(one.get("name"), str):
            raise RequestError('a LoRA is {"name": …, "scale": 1.0}, and one of loras is something else', param="loras")
        if one["name"] not in known:
            names = some(known, 10) if known else "none: LORA_LIBRARY_PATH names no folder with some"
            raise RequestError(f"there is no LoRA {shown(one['name'], 60)!r} here; there are {names}", param="loras")
        scale = one.get("scale", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise RequestError(f"a LoRA's scale is {shown(scale, 40)}, which is no number", param="loras")
        found.append((one["name"], float(scale)))
    return found


def lora_names(engine: Engine) -> list[str]:
    """LoRAs that requests may name: the library's, and the command line's."""
    return [*dict.fromkeys([*(engine.options.get("lora_paths") or ()), *library(library_folders())])]


def _images(
    fields: Mapping[str, Any], uploads: Sequence[Upload], most_pixels: int
) -> tuple[list[GivenImage], GivenImage | None]:
    said = fields.get("images", [])
    # A string that is no list is one image.
    sources = [of_url(one, "image") for one in (said if isinstance(said, list) else [said])]
    masks = [of_url(fields["mask"], "mask")] if "mask" in fields else []
    for upload in uploads:
        name = SPELLINGS.get(upload.name, upload.name)
        if name not in ("images", "mask"):
            raise RequestError(
                f"a file came as {shown(upload.name, 60)!r}: send it as image, image[] or mask",
                param=shown(upload.name, 60),
                code="unknown_field",
            )
        (sources if name == "images" else masks).append(upload.data)
    if len(sources) > MOST_IMAGES:
        raise RequestError(f"there are {len(sources)} images, and {MOST_IMAGES} are the most", param="image")
    if len(masks) > 1:
        raise RequestError("there are several masks: send one", param="mask")
    images = [opened(data, "image", most_pixels) for data in sources]
    return images, opened(masks[0], "mask", most_pixels) if masks else None


def of_url(value: Any, param: str) -> bytes:
    """The contents of an image in JSON: a data URL, or base64 alone."""
    if isinstance(value, dict):
        value = value.get("image_url")
    if not isinstance(value, str):
        raise RequestError(f"the {param} is no text: send data:image/png;base64,…", param=param, code="invalid_image")
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://|file:", value):
        raise RequestError(
            "no address is fetched: send the image itself, as data:image/png;base64,…",
            param=param,
            code="url_not_allowed",
        )
    try:
        return base64.b64decode(_DATA_URL.sub("", value, count=1), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            f"the {param} is neither data:image/png;base64,… nor base64", param=param, code="invalid_image"
        ) from None


def opened(data: bytes, param: str, most_pixels: int) -> GivenImage:
    """An image whose header says that it is one, and not too large to be decoded.

    Raises:
        RequestError: otherwise.
    """
    from mflux.utils.picture_files import oriented_size

    image = GivenImage(data, "upload.png")
    try:
        width, height = oriented_size(image)
    except MfluxError as error:
        raise RequestError(str(error), param=param, code="invalid_image") from None
    if width * height > most_pixels:
        raise RequestError(
            f"the {param} has {width} x {height} pixels, and {most_pixels:,} are the most: make it smaller",
            param=param,
            code="too_many_pixels",
        )
    return image

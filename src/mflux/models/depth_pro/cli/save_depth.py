"""`mflux-save-depth`: the depth of a photo as a picture, or in metres."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mflux.cli.parser.groups import add_device_option
from mflux.cli.parser.parsers import MfluxParser
from mflux.cli.terminal import run, say_line
from mflux.errors import UsageError
from mflux.utils.paths import is_folder
from mflux.utils.values import QUANTIZE_CHOICES

if TYPE_CHECKING:
    import numpy as np

    from mflux.models.common.controls.depth_pro.depth_pro import DepthResult

log = logging.getLogger(__name__)

_SUFFIXES = {"png": ".png", "png16": ".png", "npy": ".npy"}

# Evenly spaced colours from the farthest point to the nearest; what lies between is mixed.
COLORMAPS = {
    "gray": ("000000", "ffffff"),
    "dusk": ("3b0a57", "3d4f8f", "1f8a8c", "55c567", "f7e52b"),
    "ember": ("050417", "56106e", "bb3654", "f98d0a", "fcffa8"),
    "rainbow": ("30123b", "4480f0", "1ed6c4", "8ffb4f", "f3c83a", "ee5a11", "7a0403"),
}


def build_parser() -> MfluxParser:
    """The command's parser; completions use it as well."""
    parser = MfluxParser(
        prog="mflux-save-depth",
        description="Estimate the depth of a photo with Depth Pro and save it beside the photo as NAME_depth.png.",
    )
    parser.add_argument("--image-path", type=Path, required=True, help="the photo")
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="Depth Pro's weights: a .pt or .safetensors file, or a folder or Hugging Face repository in the layout of "
        "apple/DepthPro-hf (default: Apple's published file, fetched once)",
    )
    parser.add_argument("--output", type=Path, metavar="PATH", help="the file to write, or the folder to write it in")
    parser.add_argument(
        "--format",
        choices=sorted(_SUFFIXES),
        help="png: near is bright, 8 bits (default); png16: the same in 16 bits; npy: the distance in metres, float32",
    )
    parser.add_argument("--colormap", choices=list(COLORMAPS), help="colours for png (default: gray)")
    parser.add_argument(
        "--quantize", "-q", type=int, choices=QUANTIZE_CHOICES, help="bits per weight to quantize the encoders to"
    )
    add_device_option(parser)
    return parser


def save_depth(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    kind, output = _plan(args)

    from mflux.models.common.controls.depth_pro.depth_pro import DepthPro, open_photo
    from mflux.utils.atomic_files import write_atomically

    # A picture that cannot be read is told before gigabytes are loaded.
    open_photo(args.image_path)
    started = time.perf_counter()
    model = DepthPro(quantize=args.quantize, model_path=args.model)
    loaded = time.perf_counter()
    result = model.create_depth_map(args.image_path)
    data = encode(result, kind, args.colormap or "gray")
    log.debug("loaded in %.1f s, estimated in %.1f s", loaded - started, time.perf_counter() - loaded)
    log.debug("%s", _describe(result))
    say_line(write_atomically(output, lambda file: file.write(data), overwrite=False))


def encode(result: DepthResult, kind: str, colormap: str = "gray") -> bytes:
    """The bytes of a file of the given format. A 16-bit picture carries in its text what its black and white mean."""
    import io

    import numpy as np
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    file = io.BytesIO()
    if kind == "npy":
        if result.metric_depth is None:
            raise UsageError("this network estimates no field of view, so no metres: choose --format png or png16")
        np.save(file, np.array(result.metric_depth))
        return file.getvalue()
    text = PngInfo()
    text.add_text("min_depth", repr(result.min_depth))
    text.add_text("max_depth", repr(result.max_depth))
    if result.focal_length_px is not None:
        text.add_text("focal_length_px", repr(result.focal_length_px))
    if kind == "png16":
        picture = Image.fromarray(np.rint(result.relative_depth() * 65535).astype(np.uint16))
    elif colormap == "gray":
        picture = result.depth_image
    else:
        picture = Image.fromarray(colour(result.relative_depth(), colormap))
    picture.save(file, format="PNG", pnginfo=text)
    return file.getvalue()


def colour(values: np.ndarray, colormap: str) -> np.ndarray:
    """Values from 0 to 1, of any shape, as (…, 3) bytes of red, green and blue."""
    import numpy as np

    points = np.array([tuple(bytes.fromhex(point)) for point in COLORMAPS[colormap]], np.float32)
    places = np.linspace(0, 1, len(points))
    channels = [np.interp(values, places, points[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def _plan(args: argparse.Namespace) -> tuple[str, Path]:
    """The format and the path, from what was said and what follows from it."""
    photo = args.image_path
    output = args.output
    suffix = "" if output is None or is_folder(output) else output.suffix.lower()
    kind = args.format or ("npy" if suffix == ".npy" else "png")
    if suffix and suffix != _SUFFIXES[kind]:
        raise UsageError(f"--output {args.output} does not fit --format {kind}: end it in {_SUFFIXES[kind]}")
    if args.colormap and kind != "png":
        raise UsageError(f"--colormap works with --format png only, not with {kind}")
    if output is None or is_folder(output):
        folder = photo.parent if output is None else output
        output = folder / f"{photo.stem}_depth"
        # Not with_suffix: a dot in the photo's own name is part of it.
        output = output.with_name(output.name + _SUFFIXES[kind])
    elif not suffix:
        output = output.with_name(output.name + _SUFFIXES[kind])
    return kind, output


def _describe(result: DepthResult) -> str:
    width, height = result.depth_image.size
    text = f"{width}x{height}, inverse depth {result.min_depth:.4g} to {result.max_depth:.4g}"
    if result.metric_depth is None:
        return text
    near, far = result.metric_depth.min().item(), result.metric_depth.max().item()
    return f"{text}, focal length {result.focal_length_px:.1f} px, distances {near:.3g} m to {far:.3g} m"


def main(argv: Sequence[str] | None = None) -> int:
    return run(save_depth, argv)


if __name__ == "__main__":
    sys.exit(main())

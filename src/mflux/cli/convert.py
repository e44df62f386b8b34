"""`mflux-convert SRC DST`: PyTorch files and folders of shards into one safetensors file."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from mflux.cli.parser.groups import add_device_option
from mflux.cli.parser.parsers import MfluxParser
from mflux.cli.terminal import run, say, say_line
from mflux.errors import OutputError, UsageError
from mflux.text import some
from mflux.utils.paths import is_folder, is_there, user_path
from mflux.utils.progress import bar_class
from mflux.utils.values import QUANTIZE_CHOICES

if TYPE_CHECKING:
    from mflux.backend import mx
    from mflux.checkpoints.quantization import Quantization
    from mflux.checkpoints.readers.opening import Checkpoint
    from mflux.checkpoints.writing import Spec

_log = logging.getLogger(__name__)

_DTYPES = ("bfloat16", "float16", "float32")
LORA_LAYOUTS = ("comfyui", "kohya")


def build_parser() -> MfluxParser:
    parser = MfluxParser(
        prog="mflux-convert",
        description="Turn weights of PyTorch (.pt, .pth, .bin, .ckpt, a folder of shards), GGUF, fp8 or bitsandbytes "
        "into one safetensors file, without torch and without running anything that such a file may hold. What is "
        "packed stays packed, for mflux; --dtype makes it dense, for other programs.",
    )
    parser.add_argument("source", metavar="SRC", help="a file of weights, an index of shards, or a folder")
    parser.add_argument("destination", metavar="DST", nargs="?", help="the file to write; it gets .safetensors")
    parser.add_argument("--dtype", choices=_DTYPES, help="turn all floating-point tensors into this dtype")
    parser.add_argument(
        "--key",
        metavar="NAME",
        help="take only what lies under this name, for example state_dict; '' takes everything as it is named",
    )
    parser.add_argument("--list", action="store_true", help="print names, dtypes and shapes, and write nothing")
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")
    parser.add_argument(
        "--quantize",
        "-q",
        type=int,
        choices=QUANTIZE_CHOICES,
        help="bits per weight for linear layers and embeddings; mflux loads the result, PyTorch does not",
    )
    parser.add_argument(
        "--lora-layout",
        choices=LORA_LAYOUTS,
        help="write a LoRA that has diffusers' names, as mflux-train's, under those of ComfyUI or kohya's scripts",
    )
    parser.add_argument(
        "--base-model", metavar="MODEL", help="what the LoRA is for, with --lora-layout (default: what its header says)"
    )
    add_device_option(parser)
    return parser


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | None = None,
    key: str | None = None,
    force: bool = False,
    quantize: int | None = None,
) -> Path:
    """Write the tensors of `source` into one safetensors file, one at a time.

    Args:
        source: what `mflux.checkpoints.open_checkpoint` opens.
        destination: the file to write; `.safetensors` is added where it is missing.
        dtype: for floating-point tensors; by default each keeps its own (float64 becomes float32), and what is packed
            is as MLX holds it.
        key: as for `open_checkpoint`.
        force: replace a file that exists.
        quantize: bits for the weights of linear layers and embeddings, in MLX's format, after `dtype`. Nothing but
            their names and shapes tells them: matrices called `….weight`, in rows that divide into groups of 64.

    Returns:
        The path of the file, which is complete; in case of an error there is none.

    Raises:
        CheckpointError: the source cannot be read.
        OutputError: the destination cannot be written.
        UsageError: no such number of bits, or nothing to quantize.
    """
    from mflux.checkpoints.quantization import Quantization, pack
    from mflux.checkpoints.readers.opening import open_checkpoint
    from mflux.checkpoints.writing import SafetensorsWriter

    quantization = Quantization.asked(quantize)
    given = os.fsdecode(destination)
    if given.endswith(("/", os.sep)) or is_folder(user_path(given)):
        raise UsageError(f"{given} is a folder: name the file to write, as {Path(given) / 'model.safetensors'}")
    destination = _with_suffix(user_path(destination))
    if is_there(destination) and not force:
        raise OutputError(f"{destination} exists already: choose another name, or --force to replace it")
    checkpoint = open_checkpoint(source, key, packs=dtype is None and quantization is None)
    if any(is_there(destination) and destination.samefile(file.path) for file in checkpoint.files):
        raise OutputError(f"{destination} is the source itself: choose another name")
    specs = _specs(checkpoint, dtype)
    described = {name: checkpoint.describe(name) for name in checkpoint}
    packed = _layers(specs, quantization)
    announced = {name: spec for name, spec in specs.items() if name not in packed}
    announced |= {part: spec for parts in packed.values() for part, spec in parts.items()}
    if quantization is not None:
        if not packed:
            raise UsageError(f"{source} holds nothing to quantize, or is quantized already: leave --quantize out")
        _log.info("quantize %d tensors to %d bits, keep %d", len(packed), quantize, len(specs) - len(packed))
    overflowing: list[str] = []
    with (
        SafetensorsWriter(destination, announced, metadata={"format": "pt"}, overwrite=force) as writer,
        bar_class()(
            total=_total(announced), unit="B", unit_scale=True, desc="convert", disable=None, file=sys.stderr
        ) as bar,
    ):
        # In the file's order, so that each byte is read once, also where several names share it.
        previous, value = None, None
        for name in sorted(specs, key=lambda name: described[name].place):
            if value is None or described[name].same != previous:
                previous, value = described[name].same, _converted(checkpoint, name, specs[name], overflowing)
            parts = {name: value}
            if name in packed and quantization is not None:
                parts = {name.removesuffix("weight") + leaf: part for leaf, part in pack(value, quantization).items()}
            for part, array in parts.items():
                writer.write(part, array)
                bar.update(array.nbytes)
    _report(checkpoint, overflowing)
    return destination


def _with_suffix(path: Path) -> Path:
    if path.name in ("", ".."):
        raise UsageError(f"{path} is a folder: name the file to write")
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")


def _specs(checkpoint: Checkpoint, dtype: str | None) -> dict[str, Spec]:
    """What each tensor will be in the new file. Nothing is read, but for what only torch can make sense of."""
    from mflux.backend import mx

    specs: dict[str, Spec] = {}
    for name in checkpoint:
        description = checkpoint.describe(name)
        kind, shape = description.dtype, description.shape
        if kind is None or shape is None:
            # Either torch makes it dense, or this says why it cannot be read.
            value = checkpoint[name]
            kind, shape = value.dtype, tuple(value.shape)
        if dtype is not None and mx.issubdtype(kind, mx.floating):
            kind = getattr(mx, dtype)
        specs[name] = kind, shape
    return specs


def _layers(specs: dict[str, Spec], quantization: Quantization | None) -> dict[str, dict[str, Spec]]:
    """The weights to quantize, and what each becomes."""
    from mflux.backend import mx
    from mflux.checkpoints.quantization import divides, packed_specs

    if quantization is None:
        return {}
    return {
        name: {name.removesuffix("weight") + leaf: spec for leaf, spec in packed_specs(*spec, quantization).items()}
        for name, spec in specs.items()
        if name.endswith(".weight")
        and len(spec[1]) == 2
        and mx.issubdtype(spec[0], mx.floating)
        and divides(spec[1][1], quantization.group_size)
        and spec[1][0] > 0
        and name.removesuffix("weight") + "scales" not in specs
    }


def _converted(checkpoint: Checkpoint, name: str, spec: Spec, overflowing: list[str]) -> mx.array:
    from mflux.backend import mx

    stored = checkpoint[name]
    value = stored.astype(spec[0])
    narrows = spec[0] == mx.float16 and stored.dtype != mx.float16
    if narrows and mx.any(mx.isinf(value) & mx.isfinite(stored)).item():
        overflowing.append(name)
    return value


def _total(specs: dict[str, Spec]) -> int:
    return sum(prod(shape) * dtype.size for dtype, shape in specs.values())


def _report(checkpoint: Checkpoint, overflowing: list[str]) -> None:
    if checkpoint.dropped:
        _log.info("left out what is not a tensor: %s", some(checkpoint.dropped))
    if overflowing:
        _log.warning("values beyond float16's range became infinite in %s; bfloat16 would hold them", some(overflowing))


def list_tensors(source: str | Path, key: str | None = None) -> None:
    """Print a line for each tensor, its name, dtype and shape separated by tabs; no data are read."""
    from mflux.checkpoints.readers.opening import open_checkpoint
    from mflux.checkpoints.readers.unpickler import shown

    checkpoint = open_checkpoint(source, key)
    for name in checkpoint:
        description = checkpoint.describe(name)
        shape = "?" if description.shape is None else str(list(description.shape))
        say(f"{shown(name, 4096)}\t{description.stored}\t{shape}")
    _report(checkpoint, [])


def lay_out(
    source: str | Path, destination: str | Path, layout: str, base_model: str | None = None, *, force: bool = False
) -> Path:
    """Write a LoRA under other programs' names, see `relaying.relaid`.

    Args:
        base_model: the model that it is for; None for the one that its header names, as mflux-train's does.

    Raises:
        UsageError: nobody says which model it is for, or that takes none.
    """
    from mflux.checkpoints.readers.safetensors import read_header
    from mflux.models.common.config.model_config import built_key
    from mflux.models.common.family import family_of, load_object
    from mflux.models.common.lora.relaying import relaid

    path = user_path(source)
    name = base_model or (read_header(path)[1].get("model") if path.suffix == ".safetensors" else None)
    if name is None:
        raise UsageError(f"{path} does not say which model it is for: give --base-model, as dev or z-image")
    family = family_of(built_key(name))
    if family.lora is None:
        raise UsageError(f"{family.title} takes no LoRAs")
    return relaid(path, _with_suffix(user_path(destination)), layout, load_object(family.lora), force=force)


def main(argv: Sequence[str] | None = None) -> int:
    return run(_convert, argv)


def _convert(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    if args.list:
        if args.destination is not None:
            raise UsageError("--list only prints: leave DST out")
        list_tensors(args.source, args.key)
        return
    if args.destination is None:
        raise UsageError("name the file to write: mflux-convert SRC DST.safetensors")
    if args.lora_layout is not None:
        asked = {"--dtype": args.dtype, "--key": args.key, "--quantize": args.quantize}
        if given := [option for option, value in asked.items() if value is not None]:
            raise UsageError(f"{given[0]} and --lora-layout do not go together: do one after the other")
        say_line(lay_out(args.source, args.destination, args.lora_layout, args.base_model, force=args.force))
        return
    if args.base_model is not None:
        raise UsageError("--base-model says whose names --lora-layout takes: leave it out")
    options = {"dtype": args.dtype, "key": args.key, "force": args.force, "quantize": args.quantize}
    say_line(convert(args.source, args.destination, **options))


if __name__ == "__main__":
    sys.exit(main())

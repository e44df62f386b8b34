"""`mflux-upscale-seedvr2`: pictures, and whole folders of them, drawn again with more pixels."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mflux.cli.parser.groups import add_machine_options, add_model_options, add_output_options
from mflux.cli.parser.parsers import MfluxParser
from mflux.cli.parser.settle import add_to_name, prepare_machine, save_picture, settle_model, settle_paths
from mflux.cli.terminal import is_out_of_memory, run
from mflux.errors import CheckpointError, DownloadError, MfluxError, OutputError, UsageError
from mflux.models.seedvr2.family import FAMILY
from mflux.text import shown
from mflux.utils import values
from mflux.utils.exceptions import StopImageGenerationException

if TYPE_CHECKING:
    from mflux.models.seedvr2.variants.upscale.seedvr2 import SeedVR2

log = logging.getLogger(__name__)

COMMAND = FAMILY.command("upscale-seedvr2")
# What is taken from a folder; a file that is named may be any that can be read.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_KINDS = ", ".join(kind[1:] for kind in SUFFIXES)
_MOST_NAMES = 20


def build_parser() -> MfluxParser:
    """The command's parser; completions use it as well."""
    parser = MfluxParser(
        prog=COMMAND.prog,
        description="Draw pictures again with more pixels, with SeedVR2.",
        epilog=f"Models: {', '.join(COMMAND.models)}.",
    )
    add_model_options(parser)
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--image-path",
        "-i",
        nargs="+",
        type=Path,
        required=True,
        metavar="PATH",
        help=f"pictures, and folders whose pictures are taken ({_KINDS})",
    )
    group.add_argument(
        "--seed", "-s", type=values.seed, nargs="+", default=[42], help="one picture for each seed (default: 42)"
    )
    group.add_argument(
        "--resolution",
        "-r",
        type=values.dimension,
        default=384,
        help="pixels of the shorter side, or 2x (default: 384)",
    )
    group.add_argument(
        "--softness",
        type=values.strength,
        default=0.0,
        help="how much detail to take away first, from 0 to 1, so that more is drawn anew (default: 0)",
    )
    add_output_options(parser, settings=False)
    add_machine_options(parser)
    helps = {
        "model": f"a model's name, a Hugging Face repository (org/name), or a folder (default: {COMMAND.models[0]})",
        "output": "where to write; {image_name} and {seed} stand for the picture's name and the seed, and are added "
        "where there are several (default: image.png; an existing file is never replaced)",
        "vae_tiling": "encode and decode in overlapping tiles, as is always done here",
    }
    for action in parser._actions:
        action.help = helps.get(action.dest, action.help)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(upscale, argv)


def upscale(argv: Sequence[str] | None) -> None:
    """Check everything that can be checked without the model, then draw picture after picture.

    Raises:
        MfluxError: some could not be drawn; the others are.
    """
    args, said = build_parser().parse(argv)
    settle_paths(args, ())
    settle_model(args, said, prog=COMMAND.prog, models=COMMAND.models, default_model=COMMAND.models[0])
    batch = Batch(args)

    # From here on it takes time; the imports alone are half a second.
    from mflux.models.common.config.model_config import ModelConfig, is_builtin
    from mflux.models.seedvr2.variants.upscale.seedvr2 import SeedVR2
    from mflux.utils.picture_files import check_output

    if args.stepwise_image_output_dir:
        check_output(f"{args.stepwise_image_output_dir}/step.png")
    batch.check()
    if batch.sound:
        pipeline = SeedVR2(
            quantize=args.quantize,
            model_path=None if is_builtin(args.model) else args.model,
            model_config=ModelConfig.from_name(args.model, args.base_model),
        )
        memory = prepare_machine(args, pipeline, len(batch.sound) * len(args.seed))
        if pipeline.tiling_config is not None and args.vae_tile_size:
            # Encoding would take the most memory otherwise.
            pipeline.tiling_config = replace(pipeline.tiling_config, vae_encode_tile_size=args.vae_tile_size)
        batch.draw(pipeline)
        if memory is not None:
            log.info(memory.memory_stats())
    batch.tell_failures()


class Batch:
    """The pictures of one call. What goes wrong with one of several does not stop the others.

    Attributes:
        pictures: the files.
        sound: those of them that can be drawn, as far as their headers tell.
        failed: the files, and folders without pictures, that could not be drawn.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.pictures: list[Path] = []
        self.sound: list[Path] = []
        self.failed: list[Path] = []
        self.alone = len(args.image_path) == 1 and not is_folder(args.image_path[0])
        for path in args.image_path:
            with self.apart(path):
                self.pictures += pictures_in(path)
        # The same file twice is one picture.
        self.pictures = list(dict.fromkeys(self.pictures))
        if not self.alone:
            add_to_name(args, "_", "{image_name}")
        if len(args.seed) > 1:
            add_to_name(args, "_seed_", "{seed}")

    @contextmanager
    def apart(self, path: Path) -> Iterator[None]:
        """Keep what goes wrong with one file for the end. What would go wrong with every one, such as damaged weights,
        comes out."""
        try:
            yield
            return
        except (CheckpointError, DownloadError, StopImageGenerationException):
            raise
        except MfluxError as error:
            if self.alone:
                raise
            why = str(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            why = "not enough memory: try --low-ram, a smaller --resolution, or --vae-tile-size 256"
            if self.alone:
                raise MfluxError(why) from None
        log.warning("%s is left out: %s", shown(path, 200), why)
        self.failed.append(path)

    def check(self) -> None:
        """Find what the headers of the files tell, and names that cannot be written, before anything is loaded."""
        from mflux.models.seedvr2.sources import target_size
        from mflux.utils.picture_files import TRANSPARENT, alpha_of, check_output, open_image, opened

        if self.pictures:
            # A name that is none is so for all of them.
            with suppress(OutputError):
                check_output(self.output(self.pictures[0], self.args.seed[0]))
        for path in self.pictures:
            with self.apart(path):
                outputs = [check_output(self.output(path, seed)) for seed in self.args.seed]
                opaque = [output for output in outputs if output.suffix.lower() not in TRANSPARENT]
                with opened(path) as image:
                    target_size(image.size, self.args.resolution)
                    decode = self.alone or (opaque and image.has_transparency_data)
                # Not that of every file, which would take long where there are thousands.
                if decode and alpha_of(open_image(path)) is not None and opaque:
                    raise UsageError(
                        f"{opaque[0]} cannot hold transparency, and {path} has some: use .png, .webp or .tiff"
                    )
                self.sound.append(path)

    def output(self, path: Path, seed: int) -> str:
        # The seed first: a picture's own name may hold anything.
        return self.args.output.replace("{seed}", str(seed)).replace("{image_name}", path.stem)

    def draw(self, pipeline: SeedVR2) -> None:
        """A picture for each sound file and seed."""
        from mflux.models.common.memory import give_back_memory
        from mflux.models.seedvr2.sources import target_size
        from mflux.utils.picture_files import oriented_size

        args = self.args
        started = time.perf_counter()
        for number, path in enumerate(self.sound):
            failed = len(self.failed)
            with self.apart(path):
                before = oriented_size(path)
                after = target_size(before, args.resolution)
                seconds = (time.perf_counter() - started) / number * (len(self.sound) - number) if number else None
                log.info(
                    "%d of %d: %s, %dx%d to %dx%d%s",
                    *(number + 1, len(self.sound), path.name, *before, *after, _remaining(seconds)),
                )
                for seed in args.seed:
                    is_last = path is self.sound[-1] and seed == args.seed[-1]
                    pipeline.keep = replace(pipeline.keep, for_next_image=not is_last)
                    image = pipeline.generate_image(seed, path, args.resolution, args.softness)
                    save_picture(image, args, seed, output=self.output(path, seed))
            if len(self.failed) > failed:
                give_back_memory()

    def tell_failures(self) -> None:
        """
        Raises:
            MfluxError: names what could not be drawn.
        """
        if not self.failed:
            return
        names = [shown(path, 200) for path in self.failed]
        drawn = len(set(self.sound) - set(self.failed))
        more = [f"and {len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
        raise MfluxError(
            f"{len(names)} of {len(names) + drawn} could not be drawn, the warnings say why: "
            f"{', '.join(names[:_MOST_NAMES] + more)}"
        )


def pictures_in(path: Path) -> list[Path]:
    """The pictures of a folder by name, without those of its folders and hidden ones; or the file itself.

    Raises:
        UsageError: a folder without pictures, or that cannot be read.
    """
    if not is_folder(path):
        return [path]
    try:
        files = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()]
    except OSError as error:
        raise UsageError(f"the folder {path} cannot be read ({error.strerror}): give another") from None
    files = sorted((file for file in files if not file.name.startswith(".")), key=lambda file: file.name.lower())
    if not files:
        raise UsageError(f"the folder {path} holds no pictures ({_KINDS}): give another, or the files themselves")
    return files


def is_folder(path: Path) -> bool:
    """Whether there is a folder; what cannot be looked at, or has too long a name, is told when it is opened."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _remaining(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"


if __name__ == "__main__":
    sys.exit(main())

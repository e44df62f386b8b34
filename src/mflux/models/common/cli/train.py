"""`mflux-train`: a LoRA from a folder of images and captions."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux.cli.parser.groups import add_machine_options, add_model_options
from mflux.cli.parser.parsers import MfluxParser, Said
from mflux.cli.terminal import run, say_line
from mflux.errors import UsageError
from mflux.models.common.family import families

if TYPE_CHECKING:
    from mflux.models.common.training.spec import TrainingSpec

log = logging.getLogger(__name__)


def build_parser() -> MfluxParser:
    """The command's parser; completions use it as well."""
    models = [key for family in families().values() for kind in family.training for key in kind.models]
    parser = MfluxParser(
        prog="mflux-train",
        description="Train a LoRA on a folder of images and captions, as a JSON file says (docs/training.md). Ctrl-C "
        "ends a run with a checkpoint, from which --resume goes on as if nothing had been.",
        epilog=f"Models: {', '.join(dict.fromkeys(models))}.",
    )
    group = parser.add_argument_group("run")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--config", type=Path, metavar="FILE", help="the JSON file that says what to train")
    either.add_argument("--resume", type=Path, metavar="ZIP", help="the checkpoint to go on from")
    group.add_argument(
        "--dry-run", action="store_true", help="check configuration and data, load and write nothing, and exit"
    )
    add_model_options(parser)
    add_machine_options(parser)
    return parser


def train(argv: Sequence[str] | None) -> None:
    """Check everything that can be checked without the model, then train."""
    args, said = build_parser().parse(argv)
    spec = settle(args, said)
    if args.dry_run:
        steps = -(-len(spec.data) // spec.training_loop.batch_size) * spec.training_loop.num_epochs
        held_out = spec.monitoring.held_out if spec.monitoring is not None else []
        also = f", {len(held_out)} held out" if held_out else ""
        say_line(
            f"{spec.config_path or spec.checkpoint_path} is in order: {len(spec.data)} images{also}, {steps:,} batches "
            f"of {spec.training_loop.batch_size}, {spec.key}"
        )
        return

    # From here on it takes time.
    from mflux.models.common.training.runner import TrainingRunner

    _, written = TrainingRunner.run(spec, _watch(args))
    for path in (written.checkpoint, written.adapter):
        if path is not None:
            say_line(path)


def settle(args: argparse.Namespace, said: Said) -> TrainingSpec:
    """What the options and the file that they name say together; an option comes before the file.

    Raises:
        UsageError: they make no sense, or not together.
    """
    from mflux.models.common.training.checkpoint import Checkpoint
    from mflux.models.common.training.spec import TrainingSpec, check_resumes, read_configuration
    from mflux.utils.paths import user_path

    if (args.config is None) == (args.resume is None):
        raise UsageError("give --config FILE to begin, or --resume CHECKPOINT.zip to go on (see mflux-train --help)")
    machine: dict[str, Any] = {}
    if args.low_ram:
        machine["low_ram"] = True
    if args.mlx_cache_limit_gb is not None:
        machine["cache_limit_gb"] = args.mlx_cache_limit_gb
    if args.vae_tiling or args.vae_tile_size:
        machine["vae_tile_size"] = args.vae_tile_size or 512
    makes = not args.dry_run
    if args.resume is not None:
        checkpoint = Checkpoint(user_path(args.resume))
        check_resumes(checkpoint.path, args.model, args.base_model, args.quantize)
        checkpoint.configuration |= machine
        return TrainingSpec.from_checkpoint(checkpoint, create_output_dir=makes)
    config = read_configuration(args.config) | machine
    if args.model is not None:
        _take_model(config, args)
    elif args.base_model is not None:
        config["base_model"] = args.base_model
    if args.quantize is not None:
        config["quantize"] = args.quantize
    return TrainingSpec.from_conf(config, args.config, create_output_dir=makes)


def _take_model(config: dict[str, Any], args: argparse.Namespace) -> None:
    """Another model than the configuration's; a folder with `--base-model` is where the base model's weights lie."""
    config["model"] = args.model
    for name in ("model_path", "base_model"):
        config.pop(name, None)
    if args.base_model is not None:
        config["base_model"] = args.base_model


def _watch(args: argparse.Namespace) -> Callable[[], None]:
    from mflux.callbacks.instances.battery_saver import battery_percentage
    from mflux.utils.exceptions import StopTrainingException

    limit = args.battery_percentage_stop_limit

    def watch() -> None:
        percentage = battery_percentage()
        if percentage is not None and percentage <= limit:
            raise StopTrainingException(
                f"stopped: the battery is at {percentage} %, the limit is {limit} % (--battery-percentage-stop-limit); "
                "plug in and go on with --resume"
            )

    return watch


def main(argv: Sequence[str] | None = None) -> int:
    return run(train, argv)


if __name__ == "__main__":
    sys.exit(main())

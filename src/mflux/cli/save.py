"""`mflux-save`: a model, quantized or not, as a folder that loads by itself."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from mflux.cli.parser.groups import add_device_option, add_lora_options, add_model_options, add_part_options
from mflux.cli.parser.parsers import MfluxParser
from mflux.cli.parser.settle import refuse_what_is_not_built, settle_loras, settle_paths
from mflux.cli.terminal import run, say_line
from mflux.errors import UsageError
from mflux.models.common.family import built, family_of


def build_parser() -> MfluxParser:
    """The command's parser; completions use it as well."""
    parser = MfluxParser(
        prog="mflux-save",
        description="Save a model, quantized or as it is, to a folder in the published layout, which loads without -q.",
        epilog=f"Models: {', '.join(built())}, and folders and repositories that derive from them.",
    )
    add_model_options(parser, required=True)
    add_part_options(parser)
    parser.add_argument(
        "--path",
        type=Path,
        metavar="FOLDER",
        help="the folder to write, which must not exist (default: one named for the model in $MFLUX_MODELS_DIR)",
    )
    add_lora_options(parser)
    add_device_option(parser)
    parser.add_argument(
        "--hf-symlink", nargs="?", const="", metavar="USER", help="not built yet: link it into Hugging Face's cache"
    )
    return parser


def save(argv: Sequence[str] | None) -> None:
    """Check everything that can be checked without the model, then write it."""
    args, said = build_parser().parse(argv)
    refuse_what_is_not_built(args)
    settle_loras(args, said)
    settle_paths(args, ())
    if not args.bake_lora:
        raise UsageError("a saved model holds its LoRAs in its weights: leave --no-bake-lora out")

    from mflux.models.common.config.model_config import ModelConfig, built_key, is_builtin
    from mflux.models.common.saved_model import (
        folder_name,
        models_folder,
        recorded_base_model,
        with_loras,
    )

    args.base_model = args.base_model or recorded_base_model(args.model)
    key = built_key(args.model, args.base_model)
    family = family_of(key)
    if args.lora_paths and family.lora is None:
        raise UsageError(f"{family.title} takes no LoRAs: leave --lora out")
    loras = {"lora_paths": args.lora_paths, "lora_scales": args.lora_scales} if family.lora else {}
    parts = {name: value for name in ("text_encoder_paths", "vae_path") if (value := getattr(args, name))}
    pipeline_class = family.pipeline_class(key)
    if parts and not parts.keys() <= inspect.signature(pipeline_class).parameters.keys():
        raise UsageError(f"{family.title} takes no parts from elsewhere: leave --vae and --text-encoder out")
    model_path = None if is_builtin(args.model) else args.model
    parent = models_folder() if args.path is None else None

    # From here on it takes time.
    from mflux.checkpoints.saving import refuse_existing

    if args.path is not None:
        refuse_existing(args.path)
    pipeline = pipeline_class(
        args.quantize,
        model_config=ModelConfig.from_name(args.model, args.base_model),
        model_path=model_path,
        **parts,
        **loras,
    )
    if parent is None:
        target = args.path
    else:
        target = with_loras(parent / folder_name(key, model_path, pipeline.bits), bool(args.lora_paths))
    pipeline.save_model(str(target))
    say_line(target)


def main(argv: Sequence[str] | None = None) -> int:
    return run(save, argv)


if __name__ == "__main__":
    sys.exit(main())

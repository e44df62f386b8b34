"""`mflux-generate`: pictures with FLUX.1."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mflux.cli import parser as options
from mflux.errors import NotBuiltError, UsageError
from mflux.models.common.config.registry import BUILT
from mflux.utils.scale_factor import ScaleFactor

log = logging.getLogger(__name__)


def build_parser() -> options.MfluxParser:
    """The command's parser; completions and tests use it as well."""
    parser = options.MfluxParser(
        prog="mflux-generate",
        description="Draw with FLUX.1 from a prompt, or from a prompt and a picture.",
        epilog=f"Models: {', '.join(BUILT)}. The model demo comes with mflux and needs no download.",
    )
    options.add_model_options(parser)
    options.add_prompt_options(parser)
    options.add_generation_options(parser, default_size="1024; demo: 128; the source picture's, if there is one")
    options.add_image_options(parser)
    options.add_lora_options(parser)
    options.add_pid_options(parser)
    options.add_output_options(parser)
    options.add_machine_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return options.run(generate, argv)


def generate(argv: Sequence[str] | None) -> None:
    """Parse, check everything that can be checked without the model, then draw."""
    parser = build_parser()
    args = parser.parse_args(argv)
    options.refuse_what_is_not_built(args)
    options.settle_image(args, argv)
    if args.config_from_metadata:
        take_settings(args, argv)
    options.settle_loras(args, argv)
    options.settle_seeds(args)
    model_config = check(args, argv)

    # From here on it takes time; the imports alone are half a second.
    from mflux.models.common.config.model_config import is_builtin
    from mflux.models.common.schedulers import scheduler_class
    from mflux.utils.image_util import ImageUtil, check_output

    for seed in args.seed:
        check_output(args.output.replace("{seed}", str(seed)))
    if args.stepwise_image_output_dir:
        check_output(f"{args.stepwise_image_output_dir}/step.png")
    scheduler_class(args.scheduler)
    prompt = options.read_prompt(args)
    width, height = resolve_size(args, model_config)

    from mflux.callbacks.instances.memory_saver import LastPictureSaver
    from mflux.models.flux.variants.txt2img.flux import Flux1

    model_path = None if is_builtin(args.model) else args.model
    flux = Flux1(
        args.quantize,
        model_config=model_config,
        model_path=model_path,
        lora_paths=args.lora_paths,
        lora_scales=args.lora_scales,
        bake_lora=args.bake_lora,
    )
    if options.was_given(argv, "--guidance") and not flux.model_config.supports_guidance:
        log.warning("--guidance is ignored: %s was made without guidance", args.model)
    ImageUtil.embed_metadata_enabled = not args.no_metadata
    memory = prepare_machine(args, flux)
    options.advise()

    for index, seed in enumerate(args.seed):
        if index == len(args.seed) - 1:
            flux.callbacks.register(LastPictureSaver(flux))
        if index > 0 and args.prompt_file is not None:
            prompt = options.read_prompt(args)
        image = flux.generate_image(
            seed=seed,
            prompt=prompt,
            num_inference_steps=args.steps,
            height=height,
            width=width,
            guidance=options.DEFAULT_GUIDANCE if args.guidance is None else args.guidance,
            image_path=args.image_path,
            image_strength=args.image_strength if args.image_path else None,
            scheduler=args.scheduler,
        )
        print(image.save(args.output.replace("{seed}", str(seed)), export_json_metadata=args.metadata), flush=True)
    if memory is not None:
        log.info(memory.memory_stats())


def take_settings(args: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """Fill in from the settings of an earlier picture what the command line leaves open.

    Raises:
        UsageError: a setting makes no sense, or asks for what is not built.
    """
    source = args.config_from_metadata
    settings = options.read_settings(source)

    def take(name: str, read: Callable[[Any], Any], *flags: str, target: str | None = None) -> None:
        value = settings.get(name)
        if value is None or options.was_given(argv, *flags):
            return
        try:
            setattr(args, target or name, read(value))
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{source}: its {name} makes no sense, {error}: say {flags[0]} yourself") from None

    text = options.saved()
    if not options.was_given(argv, "--model", "-m"):
        # The command line of the earlier picture named a folder or repository; the model is what that was taken for.
        take("model", text, "--model")
        take("model_path", text, "--model", target="model")
        if args.base_model is None:
            if settings.get("model_path"):
                take("model", text, "--base-model", target="base_model")
            if settings.get("base_model") != "None":  # older versions of mflux wrote this for a built-in model
                take("base_model", text, "--base-model")
    take("prompt", text, "--prompt", "--prompt-file")
    take("negative_prompt", text, "--negative-prompt")
    take("steps", options.saved(options.steps), "--steps")
    take("guidance", options.saved(options.guidance), "--guidance")
    take("height", options.saved(options.pixels), "--height")
    take("width", options.saved(options.pixels), "--width")
    take("image_path", text, "--image", "--image-path")
    take("image_strength", options.saved(options.strength), "--image-strength", "--image")
    take("quantize", options.saved(options.bits), "--quantize", "-q")
    lora_flags = ("--lora", "--lora-paths", "--lora-style")
    take("lora_paths", options.saved_list(text), *lora_flags)
    take("lora_scales", options.saved_list(options.saved(options.number(float))), "--lora-scales", *lora_flags)
    take("bake_lora", options.saved_switch, "--bake-lora", "--no-bake-lora")
    take("scheduler", text, "--scheduler")
    if "." in args.scheduler and not options.was_given(argv, "--scheduler"):
        raise UsageError(f"{source}: its scheduler {args.scheduler} would be imported: say --scheduler yourself")
    if args.auto_seeds <= 0:
        take("seed", lambda value: [options.saved(options.seed)(value)], "--seed")
    if settings.get("pid_decode") and not options.was_given(argv, "--no-pid-decode"):
        raise NotBuiltError(
            f"{source}: the model of that picture is decoded with PiD, which is not built yet: --no-pid-decode does "
            "without"
        )


def check(args: argparse.Namespace, argv: Sequence[str] | None):
    """The model's configuration, once all that needs no weights has been found in order.

    Raises:
        UsageError: no model, no prompt, or a model that another command draws with.
        ModelConfigError: the model's name tells nothing.
    """
    from mflux.models.common.config.model_config import DEFAULT_STEPS, ModelConfig, built_key, suggestion
    from mflux.models.common.config.saved_model import recorded_base_model

    if args.model is None and args.base_model is None:
        raise UsageError(f"no model was named: {suggestion()}")
    if args.prompt is None and args.prompt_file is None:
        raise UsageError('no prompt was given: use --prompt "…", --prompt - or --prompt-file FILE')
    args.model = args.model or args.base_model
    args.base_model = args.base_model or recorded_base_model(args.model)
    built_key(args.model, args.base_model)
    if args.image_path is None and options.was_given(argv, "--image-strength"):
        raise UsageError(
            "--image-strength says how much of a picture to keep, and there is none: use --image PATH STRENGTH"
        )
    config = ModelConfig.from_name(args.model, args.base_model)
    if args.steps is None:
        args.steps = config.default_steps or DEFAULT_STEPS
    if args.negative_prompt:
        log.warning("--negative-prompt is ignored: FLUX.1 has no negative branch")
    return config


def resolve_size(args: argparse.Namespace, model_config) -> tuple[int, int]:
    """Width and height in pixels.

    Raises:
        UsageError: a scale factor without a picture, or a side that comes out too small.
        ImageError: the picture to start from cannot be read.
    """
    from mflux.models.common.config.config import on_grid
    from mflux.utils.dimension_resolver import DimensionResolver

    if args.image_path is not None:
        # Decoded once now, so that a broken picture is told before the weights are loaded.
        from mflux.utils.image_util import open_image

        open_image(args.image_path)
    elif factors := [side for side in (args.width, args.height) if isinstance(side, ScaleFactor) and side.value != 1]:
        raise UsageError(f"a size of {factors[0]} needs a picture to start from: use --image PATH, or say it in pixels")
    width, height = DimensionResolver.resolve(
        height=args.height,
        width=args.width,
        reference_image_path=args.image_path,
        default=model_config.default_size,
    )
    return on_grid(width, "width"), on_grid(height, "height")


def prepare_machine(args: argparse.Namespace, flux):
    """Register what watches over memory, battery and steps; returns the memory saver of `--low-ram`, or None."""
    from mflux.callbacks.instances.battery_saver import BatterySaver
    from mflux.callbacks.instances.memory_saver import MemorySaver, limit_cache
    from mflux.models.common.autoencoders.tiling import TilingConfig

    if args.vae_tiling or args.vae_tile_size:
        flux.tiling_config = TilingConfig(vae_decode_tile_size=args.vae_tile_size or 512)
    limit = int(args.mlx_cache_limit_gb * 1e9) if args.mlx_cache_limit_gb else None
    flux.callbacks.register(BatterySaver(args.battery_percentage_stop_limit))
    if args.stepwise_image_output_dir:
        from mflux.callbacks.instances.stepwise_handler import StepwiseHandler
        from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator

        flux.callbacks.register(StepwiseHandler(flux, args.stepwise_image_output_dir, FluxLatentCreator))
    # A run that encodes another prompt later makes room for the encoders: its peak is one stage, not two.
    flux.keep_transformer = False
    memory = None
    if args.low_ram:
        memory = MemorySaver(flux, keep_transformer=len(args.seed) > 1)
        flux.callbacks.register(memory)
    if limit is not None:
        limit_cache(limit)
    return memory


if __name__ == "__main__":
    sys.exit(main())

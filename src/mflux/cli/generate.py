"""The one command that draws, whatever the family: parse, settle, check, then a picture for each seed.

A family's command is a `Generate`: which class, which options, which defaults. Everything that can be checked without
the model is checked before anything heavy is loaded.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mflux.cli import parser as options
from mflux.cli.parser import was_given
from mflux.errors import ModelConfigError, NotBuiltError, UsageError
from mflux.models.common.family import STAGES, built, load_object
from mflux.text import shown, some
from mflux.utils import values
from mflux.utils.paths import is_repository
from mflux.utils.scale_factor import ScaleFactor
from mflux.utils.settings import SETTINGS

log = logging.getLogger(__name__)

PLAIN_SIZES = ("width", "height")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """A command that draws, as data.

    Attributes:
        prog: "mflux-generate".
        description: one sentence about it.
        pipeline: its class, "package.module:Class".
        models: what it draws with, keys of the registry.
        default_model: what it draws with where no model is said, and what a folder or repository is taken for whose
            name and settings do not tell.
        stands_for: which of `models` is meant by another model's key: {"dev": "dev-controlnet-canny"}.
        default_size: what is taken where no size is said, for the help.
        leave_out: groups of options that it lacks: "image", "lora", "pid", "prompt", "settings" (`-C`); or
            "lora_style" alone, since styles are FLUX.1's.
        published_schedule: whether `--scheduler`'s default is only what 0.24 took: where nothing is said the class gets
            None and takes the checkpoint's schedule, and a picture that 0.24 or older made is replayed with 0.24's.
        defaults: other defaults than the common ones, by destination: {"scheduler": …, "model": …, "width": 1024}.
            A width and height that are numbers make both options plain numbers of pixels.
        guidance: what is taken where no guidance is said; None leaves it to the class.
        add_options: adds the command's own options to the parser.
        sources: destinations of options, beside `image_path`, that name pictures: one path, or a list of them.
        size_source: the destination whose picture (the first, if several) gives the size for `auto` and `2x`.
        own_size: whether the class chooses the size where none is said, although there is a source picture.
        exact_auto: whether `auto`, if it is said, is the picture's size then, as with mflux 0.24.
        ignored: destination → why the option is ignored; said as a warning where it is given.
        check: the command's own checks of its options, before anything heavy: called with the options and the model's
            configuration; may fill in what is not said, and raises `UsageError`.
        build: further arguments for the class.
        draw: further arguments for `generate_image`.
        rewrite: how words become the prompt that the class takes. Called with the options and the words before anything
            is loaded, and raises what there is to be refused; what it returns makes the prompt, and is called when the
            model's folder is known to be sound and none of its components is in memory.
        pixels: called with the picture and the options, gives what is written in its place, with its settings.
        after: called with the picture, the path it went to, and the options, for what a command writes beside it.
    """

    prog: str
    description: str
    pipeline: str
    models: tuple[str, ...]
    default_model: str | None = None
    stands_for: Mapping[str, str] = field(default_factory=dict)
    default_size: str = "1024; the source picture's, if there is one"
    leave_out: tuple[str, ...] = ()
    published_schedule: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    guidance: float | None = 3.5
    add_options: Callable[[argparse.ArgumentParser], None] | None = None
    sources: tuple[str, ...] = ()
    size_source: str = "image_path"
    own_size: bool = False
    exact_auto: bool = False
    ignored: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[argparse.Namespace, Any], None] | None = None
    build: Callable[[argparse.Namespace], dict[str, Any]] | None = None
    draw: Callable[[argparse.Namespace], dict[str, Any]] | None = None
    rewrite: Callable[[argparse.Namespace, str], Callable[[], str]] | None = None
    pixels: Callable[[Any, argparse.Namespace], Any] | None = None
    after: Callable[[Any, Any, argparse.Namespace], None] | None = None

    def build_parser(self) -> options.MfluxParser:
        """The command's parser; completions and tests use it as well."""
        known = f"Models: {', '.join(self.models)}."
        if "demo" in self.models:
            known += " The model demo comes with mflux and needs no download."
        parser = options.MfluxParser(prog=self.prog, description=self.description, epilog=known)
        options.add_model_options(parser)
        if "prompt" not in self.leave_out:
            options.add_prompt_options(parser)
        guidance = "the model's" if self.guidance is None else str(self.guidance)
        scheduler = self.defaults.get("scheduler", "linear")
        options.add_generation_options(parser, default_size=self.default_size, guidance=guidance, scheduler=scheduler)
        if "image" not in self.leave_out:
            options.add_image_options(parser)
        if self.add_options is not None:
            self.add_options(parser)
        if "lora" not in self.leave_out:
            options.add_lora_options(parser, style="lora_style" not in self.leave_out)
        if "pid" not in self.leave_out:
            options.add_pid_options(parser)
        options.add_output_options(parser, settings="settings" not in self.leave_out)
        options.add_machine_options(parser)
        for action in parser._actions:
            if action.dest == "model" and self.default_model is not None:
                action.help = f"{action.help} (default: {self.default_model})"
            if action.dest in PLAIN_SIZES and isinstance(self.defaults.get(action.dest), int):
                action.type, action.help = values.pixels, f"pixels (default: {self.defaults[action.dest]})"
            elif action.dest == "width" and self.own_size:
                action.help = f"pixels, or 2x or auto of the source picture (default: {self.default_size})"
        parser.set_defaults(**self.defaults)
        return parser

    def main(self, argv: Sequence[str] | None = None) -> int:
        return options.run(self.run, argv)

    def run(self, argv: Sequence[str] | None) -> None:
        """Parse, check everything that can be checked without the model, then draw."""
        args = self.build_parser().parse_args(argv)
        options.refuse_what_is_not_built(args)
        if "image" not in self.leave_out:
            options.settle_image(args)
        if getattr(args, "config_from_metadata", None):
            take_settings(args)
        if "lora" not in self.leave_out:
            options.settle_loras(args)
        options.settle_seeds(args)
        options.settle_paths(args, self.sources)
        model_config = self._check(args)

        # From here on it takes time; the imports alone are half a second.
        from mflux.models.common.config.model_config import is_builtin
        from mflux.models.common.schedulers import scheduler_class
        from mflux.utils.image_util import check_output

        for seed in args.seed:
            check_output(args.output.replace("{seed}", str(seed)))
        if args.stepwise_image_output_dir:
            check_output(f"{args.stepwise_image_output_dir}/step.png")
        if args.scheduler is not None:
            scheduler_class(args.scheduler)
        prompt = None if "prompt" in self.leave_out else options.read_prompt(args)
        width, height = self._size(args, model_config)
        make_prompt = self._prompt_maker(args, prompt)

        pipeline = load_object(self.pipeline)(**self._constructor(args, model_config, is_builtin(args.model)))
        if (
            was_given(args, "guidance")
            and not pipeline.model_config.supports_guidance
            and "guidance" not in self.ignored
        ):
            log.warning("--guidance is ignored: %s was made without guidance", args.model)
        memory = prepare_machine(args, pipeline, len(args.seed))
        options.advise()

        if make_prompt is not None:
            said, prompt = prompt, make_prompt()
        for index, seed in enumerate(args.seed):
            pipeline.keep = replace(pipeline.keep, for_next_image=index < len(args.seed) - 1)
            if index > 0 and getattr(args, "prompt_file", None) is not None:
                words = options.read_prompt(args)
                if self.rewrite is None:
                    prompt = words
                elif words != said:
                    said, make_prompt = words, self._prompt_maker(args, words)
                    pipeline.release_stages(*STAGES)
                    prompt = make_prompt()
            image = pipeline.generate_image(**self._picture(args, seed, prompt, width, height))
            path = options.save_picture(image, args, seed, self.pixels(image, args) if self.pixels else None)
            if self.after is not None:
                self.after(image, path, args)
        if memory is not None:
            log.info(memory.memory_stats())

    def _prompt_maker(self, args: argparse.Namespace, words: str | None) -> Callable[[], str] | None:
        return None if self.rewrite is None or words is None else self.rewrite(args, words)

    def _constructor(self, args: argparse.Namespace, model_config, builtin: bool) -> dict[str, Any]:
        arguments = {
            "quantize": args.quantize,
            "model_path": None if builtin else args.model,
            "model_config": model_config,
        }
        if "lora" not in self.leave_out:
            names = ("lora_paths", "lora_scales", "bake_lora")
            arguments |= {name: getattr(args, name) for name in names}
        return arguments | (self.build(args) if self.build else {})

    def _picture(self, args: argparse.Namespace, seed: int, prompt: str | None, width, height) -> dict[str, Any]:
        arguments = {
            "seed": seed,
            "num_inference_steps": args.steps,
            "height": height,
            "width": width,
            "scheduler": args.scheduler if self._schedule_is_said(args) else None,
        }
        if prompt is not None:
            arguments["prompt"] = prompt
        guidance = self.guidance if args.guidance is None else args.guidance
        if guidance is not None and "guidance" not in self.ignored:
            arguments["guidance"] = guidance
        if "image" not in self.leave_out:
            arguments["image_path"] = args.image_path
            arguments["image_strength"] = args.image_strength if args.image_path else None
        if getattr(args, "negative_prompt", "") and "negative_prompt" not in self.ignored:
            arguments["negative_prompt"] = args.negative_prompt
        return arguments | (self.draw(args) if self.draw else {})

    def _schedule_is_said(self, args: argparse.Namespace) -> bool:
        if not self.published_schedule or was_given(args, "scheduler"):
            return True
        return getattr(args, "schedule_is_recorded", False) or getattr(args, "of_old_picture", False)

    def _check(self, args: argparse.Namespace):
        """The model's configuration, once all that needs no weights has been found in order.

        Raises:
            UsageError: no model, no prompt, or a model that another command draws with.
            ModelConfigError: the model's name tells nothing.
        """
        from mflux.models.common.config.model_config import DEFAULT_STEPS, ModelConfig

        settle_model(
            args,
            prog=self.prog,
            models=self.models,
            default_model=self.default_model,
            default=self.defaults.get("model"),
            stands_for=self.stands_for,
        )
        if "image" not in self.leave_out:
            check_strength(args, self.size_source)
        for name, why in self.ignored.items():
            if was_given(args, name) and getattr(args, name) not in (None, ""):
                log.warning("--%s is ignored: %s", name.replace("_", "-"), why)
        config = ModelConfig.from_name(args.model, args.base_model)
        if args.steps is None:
            args.steps = config.default_steps or DEFAULT_STEPS
        if self.check is not None:
            self.check(args, config)
        if "prompt" not in self.leave_out and args.prompt is None and args.prompt_file is None:
            raise UsageError('no prompt was given: use --prompt "…", --prompt - or --prompt-file FILE')
        return config

    def _size(self, args: argparse.Namespace, model_config) -> tuple[int | None, int | None]:
        """Width and height in pixels.

        Raises:
            UsageError: a scale factor without a picture, or a side that comes out too small.
            ImageError: a source picture cannot be read.
        """
        from mflux.models.common.config.config import on_grid
        from mflux.utils.dimension_resolver import DimensionResolver
        from mflux.utils.image_util import open_image

        # Decoded once now, so that a broken picture is told before the weights are loaded.
        names = [name for name in ("image_path", *self.sources) if getattr(args, name, None)]
        for name in names:
            sources = getattr(args, name)
            for source in sources if isinstance(sources, list) else [sources]:
                open_image(source)
        said = self.exact_auto and was_given(args, "width", "height")
        is_auto = all(isinstance(side, ScaleFactor) and side.value == 1 for side in (args.width, args.height))
        if self.own_size and is_auto and not said:
            return None, None
        reference = getattr(args, self.size_source, None) or None
        if isinstance(reference, list):
            reference = reference[0]
        factors = [side for side in (args.width, args.height) if isinstance(side, ScaleFactor) and side.value != 1]
        if reference is None and factors:
            raise UsageError(
                f"a size of {factors[0]} needs a picture to start from: use --image PATH, or say it in pixels"
            )
        width, height = DimensionResolver.resolve(
            height=args.height,
            width=args.width,
            reference_image_path=reference,
            default=model_config.default_size,
        )
        return on_grid(width, "width"), on_grid(height, "height")


def settle_model(
    args: argparse.Namespace,
    *,
    prog: str,
    models: Sequence[str],
    default_model: str | None,
    default: str | None = None,
    stands_for: Mapping[str, str] | None = None,
) -> None:
    """Fill in `model` and `base_model`, which together name one of a command's models.

    Args:
        prog, models, default_model, stands_for: as `Generate` has them.
        default: what `--model` says where nothing is said.

    Raises:
        UsageError: no model, or one that another command draws with.
        ModelConfigError: the model's name tells nothing.
    """
    from mflux.models.common.config.model_config import built_key, check_is_somewhere, key_of, suggestion
    from mflux.models.common.saved_model import recorded_base_model

    if args.model in (None, default) and was_given(args, "base_model"):
        args.model = args.base_model
    args.model = args.model or args.base_model or default_model
    if args.model is None:
        raise UsageError(f"no model was named: {suggestion()}")
    args.base_model = args.base_model or recorded_base_model(args.model)
    try:
        meant = (stands_for or {}).get(key_of(args.model, args.base_model))
    except ModelConfigError:
        if default_model is None:
            raise
        meant = default_model
    if meant is not None:
        args.base_model = meant
        if key_of(args.model, meant) != meant:
            args.model = meant
    key = built_key(args.model, args.base_model)
    if key not in models:
        check_is_somewhere(args.model)
        raise UsageError(f"{prog} does not draw with {key}: use {built()[key]} --model {args.model}")


def check_strength(args: argparse.Namespace, source: str) -> None:
    """
    Raises:
        UsageError: a strength without a picture.
    """
    if args.image_path is None and not getattr(args, source, None) and was_given(args, "image_strength"):
        raise UsageError(
            "--image-strength says how much of a picture to keep, and there is none: use --image PATH STRENGTH"
        )


def take_settings(args: argparse.Namespace) -> None:
    """Fill in from the settings of an earlier picture what the command line leaves open.

    Raises:
        UsageError: a setting makes no sense, or asks for what this command has no option for.
        NotBuiltError: it asks for what is not built.
    """
    source = args.config_from_metadata
    settings = options.read_settings(source)
    if settings.get("pid_decode") and not was_given(args, "pid_decode"):
        raise NotBuiltError(
            f"{source}: the model of that picture is decoded with PiD, which is not built yet: --no-pid-decode does "
            "without"
        )
    args.taken = frozenset()
    # Its schedule is the command's of then, or the one that is written down.
    args.schedule_is_recorded = settings.get("scheduler") is not None
    args.of_old_picture = is_old(settings.get("mflux_version"))
    for setting in SETTINGS:
        value = settings.get(setting.name)
        if setting.read is None or value is None or value == [] or value == "" or setting.name == "pid_decode":
            continue
        if was_given(args, setting.name, *setting.beaten_by):
            continue
        if setting.name == "image_path" and settings.get("image_paths") and not hasattr(args, setting.name):
            # mflux 0.24 noted the first of several source pictures twice.
            continue
        if not hasattr(args, setting.name):
            raise UsageError(
                f"{source} was made with {setting.label.lower()} ({setting.option}), which this command does not have: "
                "use the command that made it"
            )
        try:
            setattr(args, setting.name, setting.read(value))
            args.taken |= {setting.name}
        except argparse.ArgumentTypeError as error:
            raise UsageError(
                f"{source}: its {setting.name} makes no sense, {shown(error, 300)}: say {setting.option} yourself"
            ) from None
    if args.scheduler and "." in args.scheduler and not was_given(args, "scheduler"):
        raise UsageError(f"{source}: its scheduler {shown(args.scheduler)} would be imported: say --scheduler yourself")
    _take_model(args, settings)
    _tell_repositories(args)


def _tell_repositories(args: argparse.Namespace) -> None:
    """Say which repositories the settings name, before one is asked: whoever made the picture chose them."""
    named = [] if was_given(args, "model") or args.model is None else [args.model]
    if not was_given(args, "lora", "lora_paths", "lora_style"):
        named += getattr(args, "lora_paths", None) or ()
    if named := [name for name in named if is_repository(name)]:
        log.info("%s names %s: Hugging Face is asked for what is not here yet", args.config_from_metadata, some(named))


def is_old(version: Any) -> bool:
    """Whether that is mflux 0.24's version or an older one."""
    return isinstance(version, str) and version.startswith("0.")


def _take_model(args: argparse.Namespace, settings: Mapping[str, Any]) -> None:
    """The command line of the earlier picture named a folder or repository; the model is what that was taken for."""
    if was_given(args, "model"):
        return
    names = {name: settings.get(name) for name in ("model", "model_path", "base_model")}
    for name, value in names.items():
        if value is not None and not isinstance(value, str):
            raise UsageError(
                f"{args.config_from_metadata}: its {name} makes no sense, {shown(value, 40)} is not text: say --model "
                "yourself"
            )
    model = names["model_path"] or names["model"]
    if model is None:
        return
    args.model = model
    if args.base_model is None:
        if names["model_path"]:
            args.base_model = names["model"]
        if names["base_model"] not in (None, "None"):  # older versions of mflux wrote this for a built-in model
            args.base_model = names["base_model"]


def prepare_machine(args: argparse.Namespace, pipeline, pictures: int):
    """Register what watches over memory, battery and steps; returns the memory saver of `--low-ram`, or None.

    Args:
        pictures: how many are drawn.
    """
    from mflux.callbacks.instances.battery_saver import BatterySaver
    from mflux.callbacks.instances.memory_saver import MemorySaver, limit_cache
    from mflux.models.common.networks.autoencoders.tiling import TilingConfig

    if args.vae_tiling or args.vae_tile_size:
        pipeline.tiling_config = TilingConfig(vae_decode_tile_size=args.vae_tile_size or 512)
    pipeline.vae_full_precision = getattr(args, "vae_full_precision", False)
    limit = int(args.mlx_cache_limit_gb * 1e9) if args.mlx_cache_limit_gb else None
    pipeline.callbacks.register(BatterySaver(args.battery_percentage_stop_limit))
    if args.stepwise_image_output_dir:
        from mflux.callbacks.instances.stepwise_handler import StepwiseHandler

        pipeline.callbacks.register(StepwiseHandler(pipeline, args.stepwise_image_output_dir, pipeline.latent_creator))
    # A run that encodes another prompt later makes room for the encoders: its peak is one stage, not two.
    pipeline.keep = replace(pipeline.keep, transformer=False)
    pipeline.shows_progress = True
    memory = None
    if args.low_ram:
        memory = MemorySaver(pipeline, keep_transformer=pictures > 1)
        pipeline.callbacks.register(memory)
    if limit is not None:
        limit_cache(limit)
    return memory

"""The one command that draws, whatever the family: parse, settle, check, then a picture for each seed.

A family's command is a `Generate`: which class, which options, which defaults. Everything that can be checked without
the model is checked before anything heavy is loaded.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mflux.cli import terminal
from mflux.cli.parser import groups, settle
from mflux.cli.parser.parsers import MfluxParser
from mflux.cli.parser.settle import was_given
from mflux.cli.replay import take_settings
from mflux.errors import UsageError
from mflux.models.common.family import STAGES, found
from mflux.utils import values
from mflux.utils.scale_factor import ScaleFactor

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

    def build_parser(self) -> MfluxParser:
        """The command's parser; completions and tests use it as well."""
        known = f"Models: {', '.join(self.models)}."
        if "demo" in self.models:
            known += " The model demo comes with mflux and needs no download."
        parser = MfluxParser(prog=self.prog, description=self.description, epilog=known)
        groups.add_model_options(parser)
        if "prompt" not in self.leave_out:
            groups.add_prompt_options(parser)
        guidance = "the model's" if self.guidance is None else str(self.guidance)
        scheduler = self.defaults.get("scheduler", "linear")
        groups.add_generation_options(parser, default_size=self.default_size, guidance=guidance, scheduler=scheduler)
        if "image" not in self.leave_out:
            groups.add_image_options(parser)
        if self.add_options is not None:
            self.add_options(parser)
        if "lora" not in self.leave_out:
            groups.add_lora_options(parser, style="lora_style" not in self.leave_out)
        if "pid" not in self.leave_out:
            groups.add_pid_options(parser)
        groups.add_output_options(parser, settings="settings" not in self.leave_out)
        groups.add_machine_options(parser)
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
        return terminal.run(self.run, argv)

    def run(self, argv: Sequence[str] | None) -> None:
        """Parse, check everything that can be checked without the model, then draw."""
        args = self.build_parser().parse_args(argv)
        settle.refuse_what_is_not_built(args)
        if "image" not in self.leave_out:
            settle.settle_image(args)
        if getattr(args, "config_from_metadata", None):
            take_settings(args)
        if "lora" not in self.leave_out:
            settle.settle_loras(args)
        settle.settle_seeds(args)
        settle.settle_paths(args, self.sources)
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
        prompt = None if "prompt" in self.leave_out else settle.read_prompt(args)
        width, height = self._size(args, model_config)
        make_prompt = self._prompt_maker(args, prompt)

        pipeline = found(self.pipeline)(**self._constructor(args, model_config, is_builtin(args.model)))
        if (
            was_given(args, "guidance")
            and not pipeline.model_config.supports_guidance
            and "guidance" not in self.ignored
        ):
            log.warning("--guidance is ignored: %s was made without guidance", args.model)
        memory = settle.prepare_machine(args, pipeline, len(args.seed))
        terminal.advise()

        if make_prompt is not None:
            said, prompt = prompt, make_prompt()
        for index, seed in enumerate(args.seed):
            pipeline.is_last_picture = index == len(args.seed) - 1
            if index > 0 and getattr(args, "prompt_file", None) is not None:
                words = settle.read_prompt(args)
                if self.rewrite is None:
                    prompt = words
                elif words != said:
                    said, make_prompt = words, self._prompt_maker(args, words)
                    pipeline.release_stages(*STAGES)
                    prompt = make_prompt()
            image = pipeline.generate_image(**self._picture(args, seed, prompt, width, height))
            path = settle.save_picture(image, args, seed, self.pixels(image, args) if self.pixels else None)
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

        settle.settle_model(
            args,
            prog=self.prog,
            models=self.models,
            default_model=self.default_model,
            default=self.defaults.get("model"),
            stands_for=self.stands_for,
        )
        if "image" not in self.leave_out:
            settle.check_strength(args, self.size_source)
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

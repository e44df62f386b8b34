"""The one command that generates, whatever the family: options become a `Plan`, and the plan becomes images.

A family's command is a `Generate`: which class, which options, which defaults. Everything that can be checked without
the model is checked before anything heavy is loaded.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux.cli import replay, terminal
from mflux.cli.parser import groups, settle
from mflux.cli.parser.parsers import Said
from mflux.cli.parser.plugins import CommandLineParser
from mflux.cli.plan import Plan
from mflux.errors import ImageError, UsageError
from mflux.models.common.family import STAGES, Command, Family, family_of, load_object
from mflux.utils import values
from mflux.utils.scale_factor import GRID, ScaleFactor

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.utils.generated_image import GeneratedImage

log = logging.getLogger(__name__)

PLAIN_SIZES = ("width", "height")
# As a default model: the first of the command's.
FIRST = "first"


@dataclass(frozen=True, kw_only=True)
class Generate:
    """A command that generates images, as data.

    Attributes:
        command: its entry in the family's table: name, class, models.
        description: one sentence about it.
        default_model: what it generates with where no model is named, and what a folder or repository is taken for
            whose name and settings do not tell; None where there is no such model.
        stands_for: which of its models is meant by another model's key: {"dev": "dev-controlnet-canny"}.
        default_size: what is taken where no size is said, for the help.
        leave_out: groups of options that it lacks: "image", "lora", "parts", "pid", "prompt", "settings" (`-C`); or
            "lora_style" alone.
        defaults: other defaults than the common ones, by destination: {"scheduler": …, "model": …, "width": 1024}.
            A width and height that are numbers make both options plain numbers of pixels.
        guidance: what is taken where no guidance is said; None leaves it to the class.
        add_options: adds the command's own options to the parser.
        sources: destinations of options, beside `image_path`, that name images: one path, or a list of them.
        size_source: the destination whose image (the first, if several) gives the size for `auto` and `2x`.
        own_size: says of the options whether the class is to choose the size although there is a source image:
            `settle.is_auto` or `settle.is_untyped_auto`. None: never.
        ignored: destination → why the option is ignored; said as a warning where it is given.
        rejected: destination → why the option is refused where it is given.
        conditional: destination → when the option has an effect, and why not always; the class tells where it has none.
        check: the command's own checks of its options, before anything heavy: called with the options, who chose them
            and the model's configuration; may fill in what is not said, and raises `UsageError`.
        build: further arguments for the class.
        draw: further arguments for `generate_image`.
        rewrite: how words become the prompt that the class takes. Called with the options and the words before anything
            is loaded, and raises what there is to be refused. Returns the prompt, or what makes it, which is called
            when the model's folder is known to be sound and none of its components is in memory.
        pixels: called with the image and the options, gives what is written in its place, with its settings.
        after: called with the image, the path it went to, and the options, for what a command writes beside it.
    """

    command: Command
    description: str
    default_model: str | None = FIRST
    stands_for: Mapping[str, str] = field(default_factory=dict)
    default_size: str = "1024; the source picture's, if there is one"
    leave_out: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    guidance: float | None = 3.5
    add_options: Callable[[argparse.ArgumentParser], None] | None = None
    sources: tuple[str, ...] = ()
    size_source: str = "image_path"
    own_size: Callable[[argparse.Namespace, Said], bool] | None = None
    ignored: Mapping[str, str] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)
    conditional: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    check: Callable[[argparse.Namespace, Said, ModelConfig], None] | None = None
    build: Callable[[argparse.Namespace], dict[str, Any]] | None = None
    draw: Callable[[argparse.Namespace], dict[str, Any]] | None = None
    rewrite: Callable[[argparse.Namespace, str], str | Callable[[], str]] | None = None
    pixels: Callable[[Any, argparse.Namespace], Any] | None = None
    after: Callable[[Any, Path, argparse.Namespace], None] | None = None

    def __post_init__(self) -> None:
        if self.default_model == FIRST:
            object.__setattr__(self, "default_model", self.command.models[0])

    @property
    def models(self) -> tuple[str, ...]:
        return self.command.models

    @property
    def family(self) -> Family:
        return family_of(self.models[0])

    def build_parser(self) -> CommandLineParser:
        """The command's parser; completions and tests use it as well."""
        known = f"Models: {', '.join(self.models)}."
        if "demo" in self.models:
            known += " The model demo comes with mflux and needs no download."
        parser = CommandLineParser(prog=self.command.prog, description=self.description, epilog=known)
        groups.add_model_options(parser)
        if "parts" not in self.leave_out:
            groups.add_part_options(parser)
        if self.family.float16:
            groups.add_compute_precision_option(parser)
        if "prompt" not in self.leave_out:
            groups.add_prompt_options(parser, cached=True)
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
        groups.add_server_option(parser)
        groups.add_processes_option(parser)
        for action in parser._actions:
            if action.dest == "model" and self.default_model is not None:
                action.help = f"{action.help} (default: {self.default_model})"
            if action.dest in PLAIN_SIZES and isinstance(self.defaults.get(action.dest), int):
                action.type, action.help = values.pixels, f"pixels (default: {self.defaults[action.dest]})"
            elif action.dest == "width" and self.own_size is not None:
                action.help = f"pixels, or 2x or auto of the source picture (default: {self.default_size})"
        parser.set_defaults(**self.defaults)
        parser.settles = self.settle_for_plugin
        return parser

    def main(self, argv: Sequence[str] | None = None) -> int:
        return terminal.run(self.run, argv)

    def run(self, argv: Sequence[str] | None) -> None:
        """Settle what a command line asks for, then write its images."""
        plan = self.settle(*self.build_parser().parse(argv))
        said = plan.options.server
        # An empty variable is none; an option that is empty was meant to say something.
        if (url := os.environ.get("MFLUX_SERVER") or None if said is None else said) is not None:
            from mflux.serve import remote

            remote.generate(self, plan, url)
        else:
            self.write(plan)

    def plan(self, settings: Mapping[str, Any]) -> Plan:
        """Settle what a program asks for: settings as an image records them, and options by their destinations.

        Raises:
            UsageError: one of them is unknown, makes no sense, or is missing.
        """
        return self.settle(*replay.as_options(self.build_parser(), settings))

    def settle(self, args: argparse.Namespace, said: Said) -> Plan:
        """Check everything that can be checked without the model.

        Raises:
            UsageError: options make no sense, or not together.
            MfluxError: a source image, a prompt's file or a model's name is not what it should be.
        """
        said = self._settle_options(args, said)
        config = self._check(args, said)

        # From here on it takes time; the imports alone are half a second.
        from mflux.models.common.schedulers import scheduler_class

        if args.scheduler is not None:
            scheduler_class(args.scheduler)
        words = None if "prompt" in self.leave_out else settle.read_prompt(args, said)
        width, height = self._size(args, said, config)
        return Plan(
            pipeline=self.command.pipeline,
            constructor=self._constructor(args, config),
            images=tuple(self._image(args, seed, width, height) for seed in args.seed),
            words=words,
            prompt=self._prompt(args, words),
            options=args,
            said=said,
        )

    def _settle_options(self, args: argparse.Namespace, said: Said) -> Said:
        """Give every option the value that it stands for."""
        settle.refuse_what_is_not_built(args)
        if "image" not in self.leave_out:
            settle.settle_image(args, said)
        if getattr(args, "config_from_metadata", None):
            said = replay.take_settings(args, said)
        if not said.was_set("scheduler"):
            # The checkpoint's.
            args.scheduler = None
        if "lora" not in self.leave_out:
            settle.settle_loras(args, said)
        settle.settle_seeds(args, said)
        settle.settle_paths(args, self.sources)
        return said

    # What a plugin does step by step, see `mflux.programs.commands`.

    def settle_for_plugin(self, args: argparse.Namespace, said: Said) -> Said:
        """As `settle`, without a plan; `model_path` is what mflux 0.24 had there."""
        from mflux.models.common.config.model_config import is_builtin

        said = self._settle_options(args, said)
        self._check(args, said)
        args.model_path = None if is_builtin(args.model) else args.model
        return said

    def load_for_plugin(self, args: argparse.Namespace, said: Said) -> Any:
        """Open the model that settled options name."""
        pipeline = load_object(self.command.pipeline)(**self._constructor(args, self.model_of(args, said)))
        pipeline.vae_full_precision = getattr(args, "vae_full_precision", False)
        return pipeline

    def generate_for_plugin(
        self, pipeline: Any, args: argparse.Namespace, said: Said, seed: int, words: str
    ) -> GeneratedImage:
        """Generate one image of settled options."""
        width, height = self._size(args, said, self.model_of(args, said))
        arguments = self._image(args, seed, width, height)
        if "prompt" not in self.leave_out:
            prompt = self._prompt(args, words)
            arguments["prompt"] = prompt() if callable(prompt) else prompt
        image: GeneratedImage = pipeline.generate_image(**arguments)
        return image

    def model_of(self, args: argparse.Namespace, said: Said) -> ModelConfig:
        """The model that options name.

        Raises:
            UsageError: it is another command's, or the options make no sense together.
            ModelConfigError: the name tells nothing.
        """
        return self._check(args, said, tells=False)

    def write(self, plan: Plan) -> None:
        """Load the model, and write the images of a plan where its options say; under `mlx.launch` its own part."""
        from mflux.cli.ranks import own_part
        from mflux.utils.image_util import check_output

        part = own_part(plan)
        plan = part.plan
        args = plan.options
        if not plan.images:
            return
        for seed in args.seed:
            check_output(args.output.replace("{seed}", str(seed)))
        if args.stepwise_image_output_dir:
            check_output(f"{args.stepwise_image_output_dir}/step.png")
        pipeline = plan.load()
        plan = (part := part.share(pipeline)).plan
        if not plan.images:
            return
        if (
            plan.said.was_typed("guidance")
            and not pipeline.model_config.supports_guidance
            and "guidance" not in self.ignored
        ):
            log.warning("--guidance is ignored: %s was made without guidance", args.model)
        memory = settle.prepare_machine(args, pipeline, len(plan.images))
        pipeline.shows_progress = part.tells
        settle.tell_seed(args, plan.said)
        for image in self.images(plan, pipeline):
            if part.together is not None and not part.tells:
                # The first process writes it.
                continue
            path = settle.save_picture(image, args, image.seed, self.pixels(image, args) if self.pixels else None)
            if self.after is not None:
                self.after(image, path, args)
        if memory is not None:
            log.info(memory.memory_stats())

    def images(self, plan: Plan, pipeline: Any) -> Iterator[GeneratedImage]:
        """Generate the images of a plan, one after the other, with a model that fits its `key`.

        With a model that keeps its transformer for other prompts, as a program's does, other plans may follow; a
        command's makes room before its last image is decoded. A prompt's file is read anew for each image, and where
        its words have changed, the prompt is made anew.
        """
        words, prompt = plan.words, plan.prompt
        for index, arguments in enumerate(plan.images):
            is_last = index == len(plan.images) - 1
            pipeline.keep = replace(pipeline.keep, for_next_image=pipeline.keep.transformer or not is_last)
            if index > 0 and getattr(plan.options, "prompt_file", None) is not None:
                now = settle.read_prompt(plan.options, plan.said)
                if now != words:
                    words, prompt = now, self._prompt(plan.options, now)
            if callable(prompt):
                pipeline.release_stages(*STAGES)
                prompt = prompt()
            yield pipeline.generate_image(**arguments, **({} if prompt is None else {"prompt": prompt}))

    def _prompt(self, args: argparse.Namespace, words: str | None) -> str | Callable[[], str] | None:
        return words if self.rewrite is None or words is None else self.rewrite(args, words)

    def _constructor(self, args: argparse.Namespace, config: ModelConfig) -> dict[str, Any]:
        from mflux.models.common.config.model_config import is_builtin

        arguments = {
            "quantize": args.quantize,
            "model_path": None if is_builtin(args.model) else args.model,
            "model_config": config,
        }
        if "parts" not in self.leave_out:
            arguments |= {name: getattr(args, name) for name in ("text_encoder_paths", "vae_path")}
        if "lora" not in self.leave_out:
            names = ("lora_paths", "lora_scales", "bake_lora")
            arguments |= {name: getattr(args, name) for name in names}
        if self.family.float16 and args.compute_precision:
            from mflux.backend import mx

            arguments["compute_precision"] = getattr(mx, args.compute_precision)
        return arguments | (self.build(args) if self.build else {})

    def _image(self, args: argparse.Namespace, seed: int, width: int | None, height: int | None) -> dict[str, Any]:
        arguments = {"seed": seed, "num_inference_steps": args.steps, "height": height, "width": width}
        if args.scheduler is not None and "scheduler" not in self.ignored:
            arguments["scheduler"] = args.scheduler
        for name in ("step_cache_ratio", "cfg_end"):
            if (part := getattr(args, name, None)) is not None:
                arguments[name] = part
        guidance = self.guidance if args.guidance is None else args.guidance
        if guidance is not None and "guidance" not in self.ignored:
            arguments["guidance"] = guidance
        if "image" not in self.leave_out:
            arguments["image_path"] = args.image_path
            arguments["image_strength"] = args.image_strength if args.image_path else None
        if getattr(args, "negative_prompt", "") and "negative_prompt" not in self.ignored:
            arguments["negative_prompt"] = args.negative_prompt
        return arguments | (self.draw(args) if self.draw else {})

    def _check(self, args: argparse.Namespace, said: Said, *, tells: bool = True) -> ModelConfig:
        """The model's configuration, once all that needs no weights has been found in order.

        Args:
            tells: whether to warn of options that are ignored; once is enough.

        Raises:
            UsageError: no model, no prompt, or a model that another command generates with.
            ModelConfigError: the model's name tells nothing.
        """
        from mflux.models.common.config.model_config import DEFAULT_STEPS, ModelConfig

        settle.settle_model(
            args,
            said,
            prog=self.command.prog,
            models=self.models,
            default_model=self.default_model,
            default=self.defaults.get("model"),
            stands_for=self.stands_for,
        )
        if "image" not in self.leave_out:
            settle.check_strength(args, said, self.size_source)
        for name, why in self.ignored.items():
            if tells and said.was_typed(name) and getattr(args, name) not in (None, ""):
                log.warning("--%s is ignored: %s", name.replace("_", "-"), why)
        for name, why in self.rejected.items():
            if said.was_typed(name):
                raise UsageError(why)
        config = ModelConfig.from_name(args.model, args.base_model)
        if args.steps is None:
            args.steps = config.default_steps or DEFAULT_STEPS
        if self.check is not None:
            self.check(args, said, config)
        if "prompt" not in self.leave_out and args.prompt is None and args.prompt_file is None:
            raise UsageError('no prompt was given: use --prompt "…", --prompt - or --prompt-file FILE')
        return config

    def _size(self, args: argparse.Namespace, said: Said, config: ModelConfig) -> tuple[int | None, int | None]:
        """Width and height in pixels.

        Raises:
            UsageError: a scale factor without a picture, or a side that comes out too small.
            ImageError: a source picture cannot be read, or is too small to say the size.
        """
        from mflux.models.common.config.config import on_grid
        from mflux.utils.dimension_resolver import DimensionResolver
        from mflux.utils.image_util import open_image
        from mflux.utils.picture_files import oriented_size

        # Decoded once now, so that a broken picture is told before the weights are loaded.
        names = [name for name in ("image_path", *self.sources) if getattr(args, name, None)]
        for name in names:
            sources = getattr(args, name)
            for source in sources if isinstance(sources, list) else [sources]:
                open_image(source)
        if self.own_size is not None and self.own_size(args, said):
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
            default=config.default_size,
        )
        taken = [side for said, side in ((args.width, width), (args.height, height)) if not isinstance(said, int)]
        if reference is not None and min(taken, default=GRID) < GRID:
            sides = " x ".join(map(str, oriented_size(reference)))
            raise ImageError(
                f"the source image has {sides} pixels, too few to take the size from: use a larger one, or say --width "
                "and --height"
            )
        return on_grid(width, "width"), on_grid(height, "height")

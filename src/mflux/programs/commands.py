"""What plugins with a command of their own take from mflux 0.24's commands, over `cli.generate`.

A plugin parses with a command's parser, which has options of its own as well, then calls `validate`, `load`, and for
each seed `generate`, and registers callbacks and saves in between.
"""

from __future__ import annotations

import argparse
from argparse import SUPPRESS
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from mflux.cli.generate import Generate
from mflux.cli.parser import groups, settle
from mflux.cli.parser.parsers import MfluxParser, Said, default_of
from mflux.cli.parser.plugins import Options
from mflux.cli.parser.settle import NOT_BUILT_OPTIONS
from mflux.models.common.family import load_object

if TYPE_CHECKING:
    import PIL.Image

    from mflux.callbacks.instances.memory_saver import MemorySaver
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.common.pipeline import Pipeline
    from mflux.utils.generated_image import GeneratedImage

# Module → what mflux 0.24 called its command's steps.
_STEPS = {
    "qwen_image_generate": "QwenImageCommand",
    "qwen_image_edit_generate": "QwenImageEditCommand",
    "z_image_generate": "ZImageCommand",
    "z_image_turbo_generate": "ZImageTurboCommand",
    "z_image_turbo_generate_controlnet": "ZImageTurboControlnetCommand",
}


class CommandSteps:
    """The steps of a command; a subclass says which.

    Attributes:
        latent_creator: the model's, see `Pipeline`.
    """

    command: ClassVar[Generate]
    latent_creator: ClassVar[Any]

    @classmethod
    def validate(cls, args: argparse.Namespace) -> ModelConfig:
        """The model that the options name, without its weights.

        Raises:
            UsageError: it is another command's, or the options make no sense together.
            ModelConfigError: the name tells nothing.
        """
        return cls.command.model_of(*cls._settled(args))

    @classmethod
    def load(cls, args: argparse.Namespace) -> Pipeline:
        """Open the model; its components are read when they are needed."""
        pipeline: Pipeline = cls.command.load_for_plugin(*cls._settled(args))
        return pipeline

    @classmethod
    def generate(cls, model: Pipeline, args: argparse.Namespace, seed: int, prompt: str) -> GeneratedImage:
        """Generate one image."""
        return cls.command.generate_for_plugin(model, *cls._settled(args), seed, prompt)

    @classmethod
    def _settled(cls, args: argparse.Namespace) -> tuple[argparse.Namespace, Said]:
        """Options and who chose them. Of those that were not parsed, what is not as nobody chose it was chosen."""
        if isinstance(args, Options):
            return args, args.said
        parser = cls.command.build_parser()
        defaults = {action.dest: default_of(action) for action in parser._actions if action.default is not SUPPRESS}
        said = Said(frozenset(name for name, value in vars(args).items() if value != defaults.get(name)))
        whole = argparse.Namespace(**defaults | vars(args))
        if not said.was_set("scheduler"):
            # The checkpoint's.
            whole.scheduler = None
        return whole, said


def offered(module: ModuleType, name: str) -> Any:
    """What mflux 0.24's module of a command had under a name, made of the `Generate` that ours has.

    Raises:
        AttributeError: nothing.
    """
    command = next((thing for thing in vars(module).values() if isinstance(thing, Generate)), None)
    if command is not None:
        if name == _STEPS.get(module.__name__.rpartition(".")[2]):
            creator = load_object(command.command.pipeline).latent_creator
            steps = type(name, (CommandSteps,), {"command": command, "latent_creator": creator})
            steps.__module__ = module.__name__
            setattr(module, name, steps)
            return steps
        if name in _TABLES:
            return _TABLES[name](command)
    elif "build_parser" in vars(module) and name in ("IGNORED_OPTIONS", "CONDITIONAL_OPTIONS"):
        # All of its options have an effect.
        return {}
    raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def ignored_options(command: Generate) -> dict[str, str]:
    """Options without effect in a command, and why."""
    return {_option(name): why for name, why in command.ignored.items()}


def rejected_options(command: Generate) -> dict[str, str]:
    """Options that a command refuses, and with what."""
    names = {action.dest for action in command.build_parser()._actions}
    refused = {name: why for name, why in NOT_BUILT_OPTIONS.items() if name in names} | dict(command.rejected)
    return {_option(name): why for name, why in refused.items()}


def conditional_options(command: Generate) -> dict[str, dict[str, str]]:
    """Options that not every model of a command has a use for: when it has, and why not always."""
    return {
        _option(name): {"condition": condition, "reason": why} for name, (condition, why) in command.conditional.items()
    }


_TABLES: Mapping[str, Any] = {
    "DEFAULT_MODEL": lambda command: command.default_model,
    "FAMILY_MODELS": lambda command: tuple(key for key in command.models if key != command.default_model),
    "IGNORED_OPTIONS": ignored_options,
    "REJECTED_OPTIONS": rejected_options,
    "CONDITIONAL_OPTIONS": conditional_options,
}


class PromptUtil:
    @staticmethod
    def read_prompt(args: argparse.Namespace) -> str:
        """The prompt for the next image: from the option, standard input, or the file as it is now.

        Raises:
            PromptFileReadError: there is none, or it is not text.
        """
        return settle.read_prompt(_complete(args), Said())

    @staticmethod
    def read_negative_prompt(args: argparse.Namespace) -> str:
        """The negative prompt, or ""."""
        return getattr(args, "negative_prompt", "") or ""


class CallbackManager:
    @staticmethod
    def register_callbacks(
        args: argparse.Namespace,
        model: Pipeline,
        latent_creator: Any = None,
        enable_canny_saver: bool = False,
        enable_depth_saver: bool = False,
    ) -> MemorySaver | None:
        """Register what options ask for: what watches the battery and memory, and shows steps.

        Args:
            latent_creator: taken for compatibility; the model knows its own.
            enable_canny_saver, enable_depth_saver: whether the command shows what its image is generated after.

        Returns:
            The memory saver of `--low-ram`, or None.
        """
        args = _complete(args)
        if enable_canny_saver and getattr(args, "controlnet_save_canny", False):
            model.callbacks.register(CannyImageSaver(args.output))
        if enable_depth_saver and getattr(args, "save_depth_map", False):
            model.callbacks.register(DepthImageSaver(args.output))
        return settle.prepare_machine(args, model, len(getattr(args, "seed", None) or [0]))


def _complete(args: argparse.Namespace) -> argparse.Namespace:
    """Options with those that one made by hand lacks."""
    parser = MfluxParser()
    for add in (groups.add_prompt_options, groups.add_machine_options, groups.add_output_options):
        add(parser)
    return argparse.Namespace(**vars(parser.parse([])[0]) | vars(args))


class CannyImageSaver:
    """Writes the edges that an image is generated after beside it, as NAME_controlnet_canny."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def call_before_loop(self, *, canny_image: PIL.Image.Image | None = None, **_: Any) -> None:
        _save_beside(self.path, "_controlnet_canny", canny_image)


class DepthImageSaver:
    """Writes the depths that an image is generated after beside it, as NAME_depth_map."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def call_before_loop(self, *, depth_image: PIL.Image.Image | None = None, **_: Any) -> None:
        _save_beside(self.path, "_depth_map", depth_image)


def _save_beside(path: Path, words: str, image: PIL.Image.Image | None) -> None:
    if image is not None:
        from mflux.utils.image_util import ImageUtil

        ImageUtil.save_image(image, path.with_stem(path.stem + words))

"""The models that are served: what each is called, what it takes, and how a request for it becomes a plan.

Nothing is written down here that a family's command does not say already.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mflux.cli.generate import Generate
from mflux.cli.plan import Plan
from mflux.errors import MfluxError, UsageError
from mflux.models.common.family import all_settings, built, families, load_object
from mflux.text import some
from mflux.utils.given_image import GivenImage

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig

MOST_IMAGES = 16
_MASK = "masked_image_path"
# What a plan for no request in particular is made of: FIBO takes JSON, and an editor an instruction.
_SAMPLE_PROMPT = '{"short_description": "x", "edit_instruction": "x"}'
# Settings that whoever serves decides about, for all requests.
OF_THE_SERVER = frozenset({"model", "quantize", "lora_paths", "lora_scales", "bake_lora", "pid_decode"})


class ModelNotFoundError(UsageError):
    """No served model is called so."""


class UnsupportedError(UsageError):
    """The model cannot do what is asked for.

    Attributes:
        setting: what asks for it.
    """

    def __init__(self, message: str, setting: str):
        super().__init__(message)
        self.setting = setting


@dataclass(frozen=True)
class Variant:
    """One of a family's commands, and what it takes of a request.

    Attributes:
        command: the command.
        source: the option that takes the source images; "" for none.
        images: how few and how many.
        takes_mask, needs_mask: whether it takes one, and whether it has to.
        has_strength: whether a strength says how much of the image is kept; else the model edits.
    """

    command: Generate
    source: str
    images: tuple[int, int]
    takes_mask: bool
    needs_mask: bool
    has_strength: bool

    def fits(self, images: int, mask: bool) -> bool:
        return self.images[0] <= images <= self.images[1] and (self.takes_mask if mask else not self.needs_mask)


@dataclass(frozen=True)
class Served:
    """A model that requests may name.

    Attributes:
        id: what it is called: as whoever serves named it.
        key: of the registry: what it is, or derives from.
        options: settings of every request, such as `quantize`.
        variants: of the family's commands those that a request can be made with; the first is the model's own.
    """

    id: str
    key: str
    options: Mapping[str, Any] = field(default_factory=dict)
    variants: tuple[Variant, ...] = ()

    @cached_property
    def config(self) -> ModelConfig:
        from mflux.models.common.config.model_config import ModelConfig

        return ModelConfig.from_name(self.id, self.key)

    @cached_property
    def pipeline_class(self) -> Any:
        return load_object(self.variants[0].command.command.pipeline)

    @property
    def command(self) -> Generate:
        return self.variants[0].command

    @cached_property
    def takes_guidance(self) -> bool:
        if "guidance" in self.command.ignored:
            return False
        if not self.config.supports_guidance and self.pipeline_class.negative_above is None:
            return False
        try:
            # Some take it of some of a family's models alone, as FLUX.2's does.
            self._sample(self.variants[0], {"guidance": 2.0})
        except UsageError:
            return False
        return True

    @cached_property
    def takes_negative_prompt(self) -> bool:
        refused = self.command.ignored.keys() | self.command.rejected.keys()
        return self.pipeline_class.negative_above is not None and "negative_prompt" not in refused

    @property
    def takes_loras(self) -> bool:
        return "lora" not in self.command.leave_out

    @property
    def images(self) -> tuple[int, int]:
        """How few and how many source images it takes."""
        return min(one.images[0] for one in self.variants), max(one.images[1] for one in self.variants)

    @property
    def takes_mask(self) -> bool:
        return any(one.takes_mask for one in self.variants)

    @cached_property
    def fields(self) -> frozenset[str]:
        """The settings that a request may have, by their names."""
        dests = {action.dest for one in self.variants for action in one.command.build_parser()._actions}
        known = {setting.name for setting in all_settings() if setting.kind is not None and not setting.takes}
        return frozenset((dests & known) - OF_THE_SERVER) | {"seed"}

    def plan(
        self,
        settings: Mapping[str, Any],
        images: Sequence[GivenImage] = (),
        mask: GivenImage | None = None,
        *,
        n: int = 1,
    ) -> tuple[Generate, Plan]:
        """The command that does it, and what it is to do.

        Args:
            settings: as an image records them; without `model`.
            n: how many images; their seeds follow each other, from `seed` or from one at random.

        Raises:
            UsageError: it makes no sense, or the model cannot do it.
            MfluxError: a source image cannot be read.
        """
        self._refuse_what_has_no_use(settings)
        variant = self._variant(images, mask, "image_strength" in settings)
        if "image_strength" in settings and not (images and variant.has_strength):
            why = "it sees the source image in every step" if images else "there is no source image"
            raise UnsupportedError(
                f"{self.id} has no use for a strength, because {why}: leave it out", "image_strength"
            )
        wanted = {**self.options, **settings, **self._model()}
        if images:
            wanted[variant.source] = list(images) if variant.images[1] > 1 else images[0]
        if mask is not None:
            wanted[_MASK] = mask
        first = settings.get("seed")
        if first is None:
            first = random.randrange(2**32)
        if type(first) is not int:
            raise UsageError(f"seed: {str(first)[:40]!r} is not a whole number")
        wanted["seed"] = [first + number for number in range(n)]
        return variant.command, variant.command.plan(wanted)

    def sample(self) -> Plan:
        """A plan of the kind that requests have, to load the model by."""
        return self._sample(self.variants[0], {})

    def _sample(self, variant: Variant, settings: Mapping[str, Any]) -> Plan:
        from PIL import Image

        blank = GivenImage(Image.new("RGB", (64, 64)))
        wanted = {**self.options, "prompt": _SAMPLE_PROMPT, "seed": [0], **settings, **self._model()}
        if variant.images[0]:
            wanted[variant.source] = [blank] if variant.images[1] > 1 else blank
        if variant.needs_mask:
            wanted[_MASK] = blank
        return variant.command.plan(wanted)

    def _model(self) -> dict[str, Any]:
        return {"model": self.id} if self.id == self.key else {"model": self.id, "base_model": self.key}

    def _refuse_what_has_no_use(self, settings: Mapping[str, Any]) -> None:
        for setting, takes, what in (
            ("guidance", self.takes_guidance, "guidance"),
            ("negative_prompt", self.takes_negative_prompt, "a negative prompt"),
            ("lora_paths", self.takes_loras, "LoRAs"),
        ):
            if settings.get(setting) not in (None, "", []) and not takes:
                refused = self.command.ignored.get(setting) or self.command.rejected.get(setting)
                why = f" ({refused})" if refused else ""
                raise UnsupportedError(f"{self.id} has no use for {what}{why}: leave it out", setting)

    def _variant(self, images: Sequence[GivenImage], mask: GivenImage | None, strength: bool) -> Variant:
        fitting = [one for one in self.variants if one.fits(len(images), mask is not None)]
        # With images a model that edits does so, unless the strength says how much of them is to be kept.
        fitting.sort(key=lambda one: bool(images) and one.has_strength != strength)
        if fitting:
            return fitting[0]
        least, most = self.images
        if mask is not None and not self.takes_mask:
            raise UnsupportedError(f"{self.id} takes no mask", "mask")
        if mask is None and len(images) >= least and all(one.needs_mask for one in self.variants):
            raise UnsupportedError(f"{self.id} paints where a mask says, and there is none: give one", "mask")
        if not images:
            raise UnsupportedError(f"{self.id} works on a source image, and there is none: give one", "image")
        allowed = "no source image" if most == 0 else f"at most {most} source image{'s' if most > 1 else ''}"
        raise UnsupportedError(f"{self.id} takes {allowed}, and there are {len(images)}", "image")


def served(name: str, options: Mapping[str, Any]) -> Served:
    """A model to serve, by its name, a folder or a repository.

    Args:
        options: settings of every request; of those that a command lacks, only what is not its default counts.

    Raises:
        UsageError: nothing generates with it over HTTP.
        ModelConfigError: the name tells nothing.
    """
    from mflux.models.common.config.model_config import built_key
    from mflux.models.common.saved_model import recorded_base_model

    key = built_key(name, recorded_base_model(name))
    first, *others = [command for family in families().values() for command in family.commands if key in command.models]
    commands = [first, *(command for command in others if command.name == f"{first.name}-edit")]
    found = [_command(command.module) for command in commands]
    variants = [_variant(command, name, key) for command in found if command is not None]
    usable = tuple(one for one in variants if one is not None)
    if not usable:
        raise UsageError(
            f"{name} cannot be served: {first.prog} takes more than a prompt, source images and a mask; run that "
            "command instead"
        )
    return Served(name, key, dict(options), usable)


def cached_models() -> list[str]:
    """Every built-in model that is whole in Hugging Face's cache, and last of all the one that comes with mflux."""
    from mflux import hub
    from mflux.models.common.checking import check_model
    from mflux.models.common.registry import MODELS

    found = []
    for key in built():
        try:
            if key == "demo" or hub.cached_copy(MODELS[key]["model_name"]) is None:
                continue
            if check_model(key).passed:
                served(key, {})
                found.append(key)
        except MfluxError:
            continue
    return [*found, "demo"]


def _command(module: str) -> Generate | None:
    found = getattr(importlib.import_module(module), "COMMAND", None)
    return found if isinstance(found, Generate) else None


def _variant(command: Generate, name: str, key: str) -> Variant | None:
    """What a command takes; None where it has to be told what no request says."""
    actions = {action.dest: action for action in command.build_parser()._actions}
    source = next((name for name in (command.size_source, *command.sources) if name in actions and name != _MASK), "")
    required = {action.dest for action in actions.values() if action.required}
    if required - {"model", "prompt", source, _MASK}:
        return None
    most = 0 if not source else MOST_IMAGES if actions[source].nargs in ("*", "+") else 1
    least = int(most > 0 and (source in required or _demands_image(command, name, key)))
    sees_image = load_object(command.command.pipeline).sees_image
    return Variant(
        command,
        source,
        (least, most),
        takes_mask=_MASK in actions,
        needs_mask=_MASK in required,
        has_strength="image_strength" in actions and not sees_image,
    )


def _demands_image(command: Generate, name: str, key: str) -> bool:
    """Whether a prompt alone is refused."""
    try:
        wanted = {"model": name, "prompt": _SAMPLE_PROMPT, "seed": [0]}
        command.plan(wanted if name == key else {**wanted, "base_model": key})
    except UsageError:
        return True
    except MfluxError:
        return False
    return False


def named(models: Iterable[Served], name: str) -> Served:
    """
    Raises:
        ModelNotFoundError: none of them is called so.
    """
    from mflux.models.common.config.model_config import key_of

    models = list(models)
    for one in models:
        if one.id == name:
            return one
    try:
        key = key_of(name)
    except MfluxError:
        key = None
    # An alias, as in "flux.1-schnell"; a path or repository is what it says and nothing else.
    if "/" not in name:
        for one in models:
            if one.id == one.key == key:
                return one
    verb = "is" if len(models) == 1 else "are"
    raise ModelNotFoundError(f"there is no model {name!r} here: {some([one.id for one in models], 20)} {verb} served")

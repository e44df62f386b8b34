"""What options mean together: each step takes parsed options, refuses what makes no sense, and fills in the rest."""

from __future__ import annotations

import argparse
import codecs
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mflux.cli.parser.parsers import Said
from mflux.cli.terminal import say_line
from mflux.errors import ModelConfigError, NotBuiltError, OtherModelError, UsageError
from mflux.models.common.family import built
from mflux.models.common.lora.library import settle_scales
from mflux.models.common.lora.styles import style_path
from mflux.text import is_blank, is_text, plain, size
from mflux.utils import values
from mflux.utils.paths import read_bounded
from mflux.utils.scale_factor import ScaleFactor
from mflux.utils.values import Real

if TYPE_CHECKING:
    import PIL.Image

    from mflux.callbacks.instances.memory_saver import MemorySaver
    from mflux.models.common.pipeline import Pipeline
    from mflux.utils.generated_image import GeneratedImage

log = logging.getLogger(__name__)

# Of a prompt's file: nobody's has more.
_LARGEST = 16 << 20
_NO_TEXT = "is not text in UTF-8: save it as UTF-8"


_NO_PID = "PiD decoding is not built yet in this version: leave --pid-decode out"
# Options that are refused, by their destinations, and with what.
NOT_BUILT_OPTIONS = {
    "pid_decode": _NO_PID,
    "pid_degrade_sigma": _NO_PID,
    "hf_symlink": "links into Hugging Face's cache are not built yet in this version: leave --hf-symlink out",
}


def refuse_what_is_not_built(args: argparse.Namespace) -> None:
    """
    Raises:
        NotBuiltError: an option whose feature this version lacks was given.
    """
    for name, sentence in NOT_BUILT_OPTIONS.items():
        if getattr(args, name, None) not in (None, False, 0.0):
            raise NotBuiltError(sentence)


def settle_image(args: argparse.Namespace, said: Said) -> None:
    """Fold `--image PATH [STRENGTH]` into `image_path` and `image_strength`.

    Raises:
        UsageError: too many values, a strength that is not a number from 0 to 1, or the same said twice.
    """
    if args.image is None:
        return
    if said.was_typed("image_path", "image_strength"):
        raise UsageError("--image says what --image-path and --image-strength say: use --image PATH [STRENGTH] alone")
    if len(args.image) > 2:
        raise UsageError(f"--image takes a path and a strength, not {len(args.image)} values: --image photo.jpg 0.6")
    args.image_path = Path(args.image[0])
    if len(args.image) == 2:
        try:
            args.image_strength = values.strength(args.image[1])
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"the strength of --image: {error}") from None


def settle_loras(args: argparse.Namespace, said: Said) -> None:
    """Fold `--lora PATH [SCALE]` and `--lora-style` into `lora_paths` and `lora_scales`, a scale for each path.

    Raises:
        UsageError: the same said twice, too many values, or a scale that is not a number.
    """
    if args.lora is not None:
        if said.was_typed("lora_paths", "lora_scales"):
            raise UsageError(
                "--lora says what --lora-paths and --lora-scales say: use --lora PATH [SCALE] alone, once for each LoRA"
            )
        args.lora_paths, args.lora_scales = [], []
        for path, *scale in args.lora:
            if len(scale) > 1:
                raise UsageError(
                    f"--lora takes a path and a scale, not {len(scale) + 1} values: --lora {path} 0.7; say it again "
                    "for another LoRA"
                )
            try:
                args.lora_scales.append(Real()(scale[0]) if scale else 1.0)
            except argparse.ArgumentTypeError as error:
                raise UsageError(f"the scale of --lora {path}: {error}") from None
            args.lora_paths.append(path)
    args.lora_paths = list(args.lora_paths or ())
    args.lora_scales = settle_scales(args.lora_scales, len(args.lora_paths))
    if getattr(args, "lora_style", None) is not None:
        args.lora_paths.append(style_path(args.lora_style))
        args.lora_scales.append(1.0)


def is_auto(args: argparse.Namespace, said: Said) -> bool:
    """Whether neither side is said, or both as `auto`."""
    return all(isinstance(side, ScaleFactor) and side.value == 1 for side in (args.width, args.height))


def is_untyped_auto(args: argparse.Namespace, said: Said) -> bool:
    """The same where a typed `auto` stands for the source image's size, as in mflux 0.24."""
    return is_auto(args, said) and not said.was_typed("width", "height")


def settle_paths(args: argparse.Namespace, sources: Sequence[str]) -> None:
    """Expand `~` in every option that takes a path, inputs and outputs alike.

    Args:
        sources: destinations of the command's own options that name pictures.

    Raises:
        UsageError: there is no such user.
    """
    for name in ("image_path", "path", *sources):
        if value := getattr(args, name, None):
            paths = [values.image(one, _option(name)) for one in (value if isinstance(value, list) else [value])]
            setattr(args, name, paths if isinstance(value, list) else paths[0])
    folder = getattr(args, "stepwise_image_output_dir", None)
    if folder is not None and not folder.strip():
        raise UsageError("--stepwise-image-output-dir is empty: name a folder, or leave it out")
    for name in ("output", "stepwise_image_output_dir", "model"):
        # A model may be a name or a repository: only what begins like a path is one.
        if (value := getattr(args, name, None)) and value.startswith("~"):
            setattr(args, name, str(values.path(value, _option(name))))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def save_picture(
    image: GeneratedImage,
    args: argparse.Namespace,
    seed: int,
    pixels: PIL.Image.Image | None = None,
    output: str | None = None,
) -> Path:
    """Write a picture, or other pixels with its settings, to `output` or where the options say, and tell where it
    went."""
    path = image.save_with_image(
        output or args.output.replace("{seed}", str(seed)),
        image.image if pixels is None else pixels,
        export_json_metadata=args.metadata,
        embed_metadata=not args.no_metadata,
    )
    say_line(path)
    return path


def settle_seeds(args: argparse.Namespace, said: Said) -> None:
    """Give every picture its seed, and every seed its file name.

    Raises:
        UsageError: `--auto-seeds` asks for no picture, or stands beside `--seed`.
    """
    import random
    import time

    if said.was_typed("auto_seeds"):
        if said.was_typed("seed"):
            raise UsageError("--auto-seeds draws its seeds and --seed says them: leave one of them out")
        if args.auto_seeds <= 0:
            raise UsageError(f"--auto-seeds {args.auto_seeds} asks for no picture: give 1 or more, or leave it out")
    if args.auto_seeds > 0:
        args.seed = random.sample(range(10**9), args.auto_seeds)
    if args.seed is None:
        args.seed = [int(time.time())]
    if len(args.seed) > 1:
        add_to_name(args, "_seed_", "{seed}")


def tell_seed(args: argparse.Namespace, said: Said) -> None:
    """Say which seed the clock chose, once all else is in order."""
    if args.auto_seeds <= 0 and not said.was_set("seed"):
        log.info("seed %d, by the clock: --seed %d makes this image again", args.seed[0], args.seed[0])


def add_to_name(args: argparse.Namespace, words: str, placeholder: str) -> None:
    """Let `--output` give each of several pictures a name, unless it does."""
    output = Path(args.output)
    # A name that is none is refused with the others, see `check_output`.
    if placeholder not in args.output and output.name:
        args.output = str(output.with_stem(output.stem + words + placeholder))


def read_prompt(args: argparse.Namespace, said: Said) -> str:
    """The prompt for the next picture: from the option, from standard input, or from the file as it is now.

    Raises:
        PromptFileReadError: there is none, or it is not text.
    """
    from mflux.utils.exceptions import PromptFileReadError

    source = "--prompt"
    try:
        # In settings it is a prompt, and nobody is there to type another.
        if args.prompt == "-" and not said.by_program and "prompt" not in said.file:
            source = "standard input"
            if sys.stdin is None:
                raise PromptFileReadError(
                    'there is no prompt: standard input is closed: say it with --prompt "…", or pipe it in'
                )
            prompt = _text_of(_standard_input(), source).strip()
        elif args.prompt_file is not None:
            source = f"the prompt file {args.prompt_file}"
            prompt = _text_of(read_bounded(args.prompt_file, _LARGEST), source).strip()
        else:
            prompt = args.prompt or ""
    except OSError as error:
        raise PromptFileReadError(f"cannot read {source}: {error.strerror or error}") from None
    except UnicodeError:
        raise PromptFileReadError(f"{source} {_NO_TEXT}") from None
    if not is_text(prompt):
        raise PromptFileReadError(f"{source} {_NO_TEXT}")
    if is_blank(prompt):
        raise PromptFileReadError(f"there is no prompt: {source} is empty")
    return plain(prompt)


# What a text in UTF-16 or UTF-32 begins with; the longer one first, which begins like the shorter.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def _standard_input() -> bytes | str:
    """What is piped in. Its bytes, where it has any: its encoding is the shell's, and no pipe's."""
    return sys.stdin.buffer.read(_LARGEST + 1) if hasattr(sys.stdin, "buffer") else sys.stdin.read(_LARGEST + 1)


def _text_of(content: bytes | str, source: str) -> str:
    """
    Raises:
        PromptFileReadError: it is longer than any prompt.
        UnicodeError: it is not UTF-8, nor in another Unicode encoding that its mark tells.
    """
    from mflux.utils.exceptions import PromptFileReadError

    if len(content) > _LARGEST:
        raise PromptFileReadError(f"{source} has more than {size(_LARGEST)}: no prompt is as long")
    if isinstance(content, str):
        return content
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8-sig")
    return content.decode(encoding)


def settle_model(
    args: argparse.Namespace,
    said: Said,
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

    if args.model in (None, default) and said.was_typed("base_model"):
        args.model = args.base_model
    args.model = args.model or args.base_model or default_model
    if args.model is None:
        raise UsageError(f"no model was named: {suggestion()}")
    args.base_model = args.base_model or recorded_base_model(args.model)
    try:
        meant = (stands_for or {}).get(key_of(args.model, args.base_model))
    except OtherModelError:
        raise
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


def check_strength(args: argparse.Namespace, said: Said, source: str) -> None:
    """
    Raises:
        UsageError: a strength without a picture.
    """
    if args.image_path is None and not getattr(args, source, None) and said.was_typed("image_strength"):
        raise UsageError(
            "--image-strength says how much of a picture to keep, and there is none: use --image PATH STRENGTH"
        )


def prepare_machine(args: argparse.Namespace, pipeline: Pipeline, pictures: int) -> MemorySaver | None:
    """Register what watches over memory, battery and steps; returns the memory saver of `--low-ram`, or None.

    Args:
        pictures: how many are drawn.
    """
    from mflux.callbacks.instances.battery_saver import BatterySaver
    from mflux.callbacks.instances.memory_saver import MemorySaver, limit_cache
    from mflux.models.common.encoded_on_disk import EncodedOnDisk
    from mflux.models.common.networks.autoencoders.tiling import TilingConfig

    if args.vae_tiling or args.vae_tile_size:
        pipeline.tiling_config = TilingConfig(vae_decode_tile_size=args.vae_tile_size or 512)
    pipeline.vae_full_precision = getattr(args, "vae_full_precision", False)
    if pipeline.vae_full_precision and (args.vae_tiling or args.vae_tile_size):
        log.warning("--vae-tiling is ignored: --vae-full-precision decodes the whole image at once")
    limit = int(args.mlx_cache_limit_gb * 1e9) if args.mlx_cache_limit_gb else None
    pipeline.callbacks.register(BatterySaver(args.battery_percentage_stop_limit))
    if args.stepwise_image_output_dir:
        from mflux.callbacks.instances.stepwise_handler import StepwiseHandler

        pipeline.callbacks.register(StepwiseHandler(pipeline, args.stepwise_image_output_dir, pipeline.latent_creator))
    if getattr(args, "prompt_cache", False):
        pipeline.prompts_on_disk = EncodedOnDisk() if EncodedOnDisk.is_wanted() else None
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

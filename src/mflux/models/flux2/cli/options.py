"""What both commands of FLUX.2 share: options, checks, and what they become."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mflux.cli.parser.groups import add_vae_precision_option
from mflux.cli.parser.parsers import Said
from mflux.errors import UsageError
from mflux.utils.paths import user_path

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig

REJECTED = {
    "negative_prompt": "FLUX.2 has no negative prompt: leave --negative-prompt out, and describe what is to be seen"
}
CONDITIONAL = {
    "guidance": ("the model is one of FLUX.2's base models", "the others were distilled, and have it already"),
    "small_text_encoder": ("the model is a 4B one", "the others read another text encoder"),
}
# Prompt embeds of the 4B models, which are the ones the small text encoder can give.
_OF_4B = 7680


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("FLUX.2")
    group.add_argument(
        "--small-text-encoder",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="read the prompt with Qwen3-0.6B and an adapter instead of Qwen3-4B; 4B models only",
    )
    group.add_argument(
        "--small-decoder",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="decode with Black Forest Labs' smaller decoder",
    )
    add_vae_precision_option(group)


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    """
    Raises:
        UsageError: an option that FLUX.2, or this model of it, has no use for.
    """
    from mflux.models.common.config.model_config import key_of
    from mflux.models.flux2.distilled import is_distilled

    # What the settings of another model's picture may have brought along.
    args.negative_prompt = ""
    if args.guidance not in (None, 1.0) and is_distilled(user_path(args.model), key_of(args.model, args.base_model)):
        raise UsageError(
            f"--guidance is for FLUX.2's base models, and {args.model} is distilled: leave it out, or name with "
            "--base-model the base model that the weights derive from"
        )
    if args.small_text_encoder and config.transformer_overrides.get("joint_attention_dim") != _OF_4B:
        raise UsageError(
            f"--small-text-encoder is for flux2-klein-4b and flux2-klein-base-4b, not for {args.model}: leave it out"
        )


def build(args: argparse.Namespace) -> dict[str, Any]:
    """The class's own arguments."""
    return {
        "small_text_encoder": args.small_text_encoder,
        "small_decoder": args.small_decoder,
    }

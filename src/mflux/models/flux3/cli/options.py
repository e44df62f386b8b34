"""What both commands of FLUX.3 share: options, and what they become."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mflux.cli.parser.groups import add_vae_precision_option
from mflux.cli.parser.parsers import Said

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig

REJECTED = {
    "negative_prompt": "FLUX.3 has no negative prompt: leave --negative-prompt out, and describe what is to be seen"
}
CONDITIONAL = {
    "guidance": ("the model is flux3-image-klein-base", "flux3-image-klein was distilled, and has it already"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("FLUX.3")
    add_vae_precision_option(group)


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    # What the settings of another model's image may have brought along.
    args.negative_prompt = ""

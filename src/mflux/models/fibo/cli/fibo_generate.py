"""`mflux-generate-fibo`: pictures with FIBO and Fibo-lite."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from mflux.cli.generate import Generate
from mflux.cli.parser.parsers import Said
from mflux.models.fibo.cli.options import add_vlm_option, with_vlm
from mflux.models.fibo.family import FAMILY
from mflux.models.fibo.prompts import VLM_SEED, as_object

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig

log = logging.getLogger(__name__)


def check(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    if "fibo-lite" not in config.aliases:
        args.guidance = 5.0 if args.guidance is None else args.guidance
        return
    for name in ("guidance", "negative_prompt"):
        if said.was_typed(name) and getattr(args, name) not in ("", 1.0):
            log.warning("--%s is ignored: Fibo-lite was made to draw without guidance", name.replace("_", "-"))
    args.guidance, args.negative_prompt = 1.0, ""


def rewrite(args: argparse.Namespace, words: str) -> str | Callable[[], str]:
    if as_object(words) is not None:
        return words
    return with_vlm(args, lambda vlm: vlm.generate(words, seed=VLM_SEED))


COMMAND = Generate(
    command=FAMILY.command("generate-fibo"),
    description="Draw with FIBO from a structured JSON prompt, or from words that FIBO-VLM makes one of.",
    default_model=None,
    leave_out=("lora_style", "pid"),
    defaults={"model": "fibo"},
    guidance=None,
    add_options=add_vlm_option,
    check=check,
    rewrite=rewrite,
)
build_parser, main = COMMAND.build_parser, COMMAND.main

if __name__ == "__main__":
    sys.exit(main())

"""From words to the JSON object that FIBO takes, with FIBO-VLM; what both commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from mflux.models.fibo.cli.vlm_options import DEFAULT_MODEL, stream
from mflux.models.fibo.vlm.packages import check_installed

if TYPE_CHECKING:
    from mflux.models.fibo.vlm.fibo_vlm import FiboVLM


def add_vlm_option(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("words instead of JSON")
    group.add_argument(
        "--vlm-model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help=f"FIBO-VLM, which turns words into JSON; a folder or repository (default: {DEFAULT_MODEL}; needs "
        "mflux[vlm])",
    )


def with_vlm(args: argparse.Namespace, ask: Callable[[FiboVLM], str]) -> Callable[[], str]:
    """What makes a prompt: FIBO-VLM is loaded, asked, and gone again when the prompt is there.

    Raises:
        MissingExtraError: transformers is not installed; said now, before anything is fetched.
        AnswerError: from what is returned; FIBO-VLM's answer cannot be used.
    """
    check_installed()

    def make() -> str:
        from mflux.models.common.memory import release
        from mflux.models.fibo.vlm.fibo_vlm import FiboVLM
        from mflux.models.fibo.vlm.json_text import AnswerError

        vlm = FiboVLM(model_path=args.vlm_model, quantize=args.quantize)
        if args.verbose:
            vlm.on_text = stream
        try:
            return ask(vlm)
        except AnswerError as error:
            # The seed here is the picture's: FIBO-VLM's is always the same, so that the same words draw the same.
            advice = "say it in other words, or give the JSON itself (--prompt-file)"
            raise AnswerError(error.problem, error.answer, advice) from None
        finally:
            release(vlm, "decoder")

    return make

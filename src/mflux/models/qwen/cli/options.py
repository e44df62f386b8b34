"""What the few-step "Lightning" LoRAs of Qwen-Image ask for beside themselves."""

from __future__ import annotations

import argparse
import logging
import re
from pathlib import PurePath
from typing import TYPE_CHECKING

from mflux.cli.parser.parsers import Said

if TYPE_CHECKING:
    from mflux.models.common.config.model_config import ModelConfig


log = logging.getLogger(__name__)


def settle_lightning(args: argparse.Namespace, said: Said, config: ModelConfig) -> None:
    """Where a LoRA's name says that it is one, and the command line leaves them open: the schedule it was made on, as
    many steps as its name says, and no guidance, which is in its weights.

    A picture that is drawn again with its own LoRAs has its own settings."""
    if args.config_from_metadata and not said.was_typed("lora", "lora_paths"):
        return
    name = next((name for path in args.lora_paths or () if "lightning" in (name := PurePath(path).name.lower())), None)
    if name is None:
        return
    steps = re.search(r"(\d+)[-_ ]?steps?", name)
    wanted = {"scheduler": "lightning", "guidance": 1.0, "steps": int(steps[1]) if steps else None}
    taken = {key: value for key, value in wanted.items() if value is not None and not said.was_typed(key)}
    for key, value in taken.items():
        setattr(args, key, value)
    if taken:
        log.warning("%s is a Lightning LoRA: %s", name, ", ".join(f"--{key} {value}" for key, value in taken.items()))

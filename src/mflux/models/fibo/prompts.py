"""FIBO's prompts: JSON objects, and how words become one. Loads nothing heavy."""

from __future__ import annotations

import json
from typing import Any

from mflux.errors import UsageError
from mflux.utils.strict_json import NotJSON, parse

# What FIBO-VLM's answers depend on beside the words, as in mflux 0.24.
VLM_SEED = 42
# What the background remover is told where nothing is said, word for word what it was trained with.
MATTE_INSTRUCTION = (
    "Generate a detailed grayscale alpha matte. Map the opaque foreground to white and the background to black. "
    "Produce soft, anti-aliased grayscale gradients at the edges of the subject to represent fine details and "
    "transparency."
)
MATTE_PROMPT = json.dumps({"edit_instruction": MATTE_INSTRUCTION})


def as_object(prompt: str) -> dict[str, Any] | None:
    """The JSON object that a prompt is; None if it is anything else."""
    try:
        value = parse(prompt)
    except NotJSON:
        return None
    return value if isinstance(value, dict) else None


def check_prompt(prompt: str) -> None:
    """
    Raises:
        UsageError: the prompt is not a JSON object.
    """
    if not isinstance(prompt, str) or as_object(prompt) is None:
        raise UsageError(
            "FIBO draws from a JSON object and this prompt is none: mflux-generate-fibo makes one from words, and in "
            "Python FiboVLM().generate(prompt) does"
        )


def check_edit(prompt: str) -> None:
    """
    Raises:
        UsageError: the prompt is not a JSON object with an `edit_instruction`.
    """
    value = as_object(prompt) if isinstance(prompt, str) else None
    if value is None:
        raise UsageError(
            "FIBO-Edit wants a JSON object and this prompt is none: mflux-generate-fibo-edit makes one from words, and "
            "in Python FiboVLM().edit(image, instruction) does"
        )
    said = value.get("edit_instruction")
    if not isinstance(said, str) or not said.strip():
        raise UsageError(
            "the prompt has no edit_instruction, which tells FIBO-Edit what to change: add it to the JSON, or say in "
            "plain words what to change"
        )

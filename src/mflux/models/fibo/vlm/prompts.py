"""What FIBO-VLM is told: the turns it was trained on, and the instructions for editing a picture."""

from __future__ import annotations

import json
from typing import Any

import PIL.Image

from mflux.utils.strict_json import NotJSON, parse

# The fields of FIBO's structured prompt, in their order, and the kind of value that each holds.
FIELDS: dict[str, type] = {
    "short_description": str,
    "objects": list,
    "background_setting": str,
    "lighting": dict,
    "aesthetics": dict,
    "photographic_characteristics": dict,
    "style_medium": str,
    "artistic_style": str,
    "context": str,
    "text_render": list,
}

_OBJECT = (
    "description, location, relative_size, shape_and_color, texture, appearance_details, relationship, orientation; "
    "for people also pose, expression, clothing, action, gender, skin_tone_and_texture; for a group also "
    "number_of_objects, a whole number"
)
_WITHIN = {
    "short_description": "what the picture shows, up to 200 words",
    "objects": f"a list of up to five objects, each with {_OBJECT}",
    "background_setting": "the surroundings, and whatever is not among the objects",
    "lighting": "conditions, direction, shadows",
    "aesthetics": "composition, color_scheme, mood_atmosphere",
    "photographic_characteristics": "depth_of_field, focus, camera_angle, lens_focal_length",
    "style_medium": "for instance photograph, oil painting or 3D render",
    "artistic_style": "at most three words",
    "context": "what kind of picture this is, and what it is for",
    "text_render": "a list of the texts to be read in the picture, each with text, location, size, color, font, "
    "appearance_details; empty unless the instruction asks for a text",
}


def inspire(image: PIL.Image.Image, prompt: str | None) -> list[dict[str, Any]]:
    """A picture to be described, changed as the prompt says if there is one."""
    wish = (prompt or "").strip()
    return [_user(_text(f"<inspire>\n{wish}" if wish else "<inspire>"), image)]


def generate(prompt: str) -> list[dict[str, Any]]:
    """An idea to be worked out."""
    return [_user(_text(f"<generate>\n{prompt.strip()}"))]


def refine(structured_prompt: str, editing_instructions: str) -> list[dict[str, Any]]:
    """A structured prompt to be changed."""
    lines = ("<refine>", "Input:", compact(structured_prompt), "Editing instructions:", editing_instructions.strip())
    return [_user(_text("\n".join(lines)))]


def refine_picture(image: PIL.Image.Image, editing_instructions: str) -> list[dict[str, Any]]:
    """A picture to be described with changes."""
    return [_user(_text("\n".join(("<refine>", "Editing instructions:", editing_instructions.strip()))), image)]


def edit(image: PIL.Image.Image, edit_instruction: str, *, use_mask: bool) -> list[dict[str, Any]]:
    """A picture to be described as it is to be after an edit, with the instruction for the model that makes it.

    Args:
        use_mask: grey areas of the picture are to be filled, and everything else stays.
    """
    system = {"role": "system", "content": edit_instructions(use_mask=use_mask)}
    return [system, _user(_text(f"Instruction: {edit_instruction.strip()}\nAnswer with the JSON object alone."), image)]


def edit_instructions(*, use_mask: bool) -> str:
    """The system turn for `edit`."""
    if use_mask:
        task = (
            "You plan how a picture is completed. You get a picture with grey areas and an instruction. Describe the "
            "finished picture, in which the grey areas are filled and continue what is around them. Everything that is "
            "visible stays as it is. Where the instruction leaves open what belongs into a grey area, choose what is "
            "most plausible there. Never describe the grey areas themselves."
        )
        command = (
            "one command in the imperative that tells an image model what to put into the masked regions, and calls "
            "them that: 'Fill the masked regions with a meadow of poppies.'"
        )
    else:
        task = (
            "You plan how a picture is edited. You get a picture and an instruction. Describe the picture as it is to "
            "be afterwards. Whatever the instruction does not touch, take from the picture as it is: people and their "
            "poses, objects, their number, size and place, framing, camera, medium and style. What the edit entails, "
            "such as the light of a new place, changes with it in every field."
        )
        command = (
            "one command in the imperative that tells an image model all that changes, and speaks of no reference or "
            "original picture: 'Change the colour of the car to red.'"
        )
    fields = {**_WITHIN, "edit_instruction": command}
    listed = "\n".join(f"- {name}: {meaning}" for name, meaning in fields.items())
    return f"{task}\nAnswer with one JSON object with these fields:\n{listed}"


def compact(structured_prompt: str) -> str:
    """JSON without blanks between its parts; other text as it is."""
    try:
        return json.dumps(parse(structured_prompt), separators=(",", ":"), ensure_ascii=False)
    except NotJSON:
        return structured_prompt.strip()


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _user(text: dict[str, Any], image: PIL.Image.Image | None = None) -> dict[str, Any]:
    return {"role": "user", "content": [text] if image is None else [{"type": "image", "image": image}, text]}

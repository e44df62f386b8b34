"""mflux 0.24's helpers for programs that use FIBO-VLM, at its path."""

from __future__ import annotations

from pathlib import Path

import PIL.Image

from mflux.errors import UsageError
from mflux.models.fibo.prompts import as_object
from mflux.models.fibo.vlm.json_text import read_structured_prompt, to_text
from mflux.utils.atomic_files import write_atomically
from mflux.utils.paths import user_path
from mflux.utils.picture_files import as_rgb, open_image


class FiboVLMUtil:
    @staticmethod
    def save_json_prompt(output_path: Path | str, json_string: str) -> None:
        """Write a prompt for a person to change; an existing file is replaced.

        Raises:
            UsageError: it is not a JSON object.
            OutputError: it cannot be written.
        """
        if (prompt := as_object(json_string)) is None:
            raise UsageError("what is to be saved is no prompt: it is not a JSON object")
        text = to_text(prompt).encode(errors="replace")
        write_atomically(user_path(output_path), lambda file: file.write(text), overwrite=True)

    @staticmethod
    def get_structured_prompt(prompt_file: Path | str) -> str:
        """The text of a JSON prompt's file.

        Raises:
            PromptFileReadError: it cannot be read, is empty, or is not a JSON object.
        """
        return read_structured_prompt(prompt_file)

    @staticmethod
    def load_image(image_path: Path | str) -> PIL.Image.Image:
        """A picture in RGB, turned as it is to be seen; its transparency is dropped.

        Raises:
            ImageError: it cannot be read.
        """
        return as_rgb(open_image(image_path), on_white=False)

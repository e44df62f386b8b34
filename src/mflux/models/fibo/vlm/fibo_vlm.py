"""FIBO-VLM: pictures and ideas to the structured JSON prompts that FIBO draws from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from mflux.checkpoints.quantization import Quantization
from mflux.errors import UsageError
from mflux.models.common.memory import LazyComponent, timed
from mflux.models.fibo.vlm import json_text, prompts, weights
from mflux.models.fibo.vlm.generation import Answer, Sampling, generate
from mflux.models.fibo.vlm.json_text import AnswerError
from mflux.models.fibo.vlm.packages import check_installed
from mflux.models.fibo.vlm.processor import FiboVLMProcessor, Message

log = logging.getLogger(__name__)

DEFAULT_MODEL = "briaai/FIBO-vlm"
DEFAULT_STOP = ("<|im_end|>", "<|end_of_text|>")
DEFAULT_MAX_TOKENS = 4096
# What FIBO's edits carry in their aesthetics.
_SCORES = {"preference_score": "very high", "aesthetic_score": "very high"}


class FiboVLM:
    """BRIA's FIBO-VLM, a Qwen3-VL that speaks FIBO's structured prompts.

    Args:
        model_id: a Hugging Face repository.
        model_path: a folder or repository to take instead.
        quantize: 3, 4, 5, 6 or 8 bits for the weights of linear layers and embeddings, quantized while they load.

    Attributes:
        decoder: the network, loaded when it is first needed; assigning None releases it.
        on_text: gets each answer piece by piece as it comes, if set.

    Raises:
        MissingExtraError: transformers is not installed; said before anything is fetched.
        UsageError: there is no such number of bits.
        DownloadError: the model cannot be fetched.
        CheckpointError: a file is missing or damaged.
    """

    decoder = LazyComponent(lambda self: weights.load(self._folder, quantize=self._quantize))

    def __init__(
        self,
        model_id: str = DEFAULT_MODEL,
        model_path: str | None = None,
        quantize: int | None = None,
    ):
        check_installed()
        Quantization.asked(quantize)
        self._quantize = quantize
        self.model_path = model_path or model_id
        self.on_text: Callable[[str], None] | None = None
        self._folder: Path = weights.locate(self.model_path)
        self._config = weights.read_config(self._folder)
        self._processor = FiboVLMProcessor.from_folder(self._folder, self._config)
        self._end_ids = {self._processor.tokenizer.eos_token_id, *weights.end_ids(self._folder)} - {None}

    @property
    def processor(self) -> FiboVLMProcessor:
        """The tokenizer with its chat template, and the picture processor."""
        return self._processor

    def generate(
        self,
        prompt: str,
        top_p: float = 0.9,
        temperature: float = 0.2,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: list[str] | None = None,
        seed: int | None = None,
    ) -> str:
        """Work out an idea into a structured prompt; returns JSON. Arguments and errors as for `inspire`."""
        return self._ask(prompts.generate(prompt), Sampling(temperature, top_p, seed), max_tokens, stop)

    def refine(
        self,
        structured_prompt: str,
        editing_instructions: str,
        top_p: float = 0.9,
        temperature: float = 0.2,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: list[str] | None = None,
        seed: int | None = None,
    ) -> str:
        """Change a structured prompt as the instructions say; returns JSON. Further arguments as for `inspire`."""
        messages = prompts.refine(structured_prompt, editing_instructions)
        return self._ask(messages, Sampling(temperature, top_p, seed), max_tokens, stop)

    def inspire(
        self,
        image: PIL.Image.Image,
        prompt: str | None = None,
        top_p: float = 0.9,
        temperature: float = 0.2,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: list[str] | None = None,
        seed: int | None = None,
    ) -> str:
        """Describe a picture as a structured prompt.

        Args:
            image: the picture.
            prompt: what is to be different.
            top_p: only the likeliest tokens that together have this probability may come.
            temperature: 0 always takes the likeliest token; higher is more varied.
            max_tokens: where the answer is cut off.
            stop: texts that end the answer.
            seed: the same seed gives the same answer.

        Returns:
            A JSON object as text.

        Raises:
            AnswerError: the answer is not such an object and cannot be mended.
            ImageError: the picture cannot be used.
            UsageError: a setting makes no sense, or the text contains the picture token.
        """
        return self._ask(prompts.inspire(image, prompt), Sampling(temperature, top_p, seed), max_tokens, stop)

    def edit(
        self,
        image: PIL.Image.Image,
        edit_instruction: str,
        use_mask: bool = False,
        seed: int | None = None,
    ) -> str:
        """Describe a picture as it is to be after an edit, with the edit as one instruction for FIBO-Edit.

        Args:
            image: the picture; with `use_mask`, what is to be filled is grey.
            edit_instruction: what to change.
            use_mask: fill the grey areas and leave all else as it is.
            seed: the same seed gives the same answer.

        Returns:
            A JSON object as text, with `edit_instruction` among its fields.

        Raises:
            AnswerError: the answer cannot be used. Without a mask, a second way of asking is tried first.
        """
        sampling = Sampling(seed=seed)
        try:
            found = self._answer(prompts.edit(image, edit_instruction, use_mask=use_mask), sampling)
            return json_text.to_text(as_edit(found))
        except AnswerError as error:
            if use_mask:
                # The other way of asking knows nothing of masks.
                raise
            log.warning("%s; asking in another way", error)
            first = error
        try:
            found = self._answer(prompts.refine_picture(image, edit_instruction), sampling)
            return json_text.to_text(as_edit(found, instead=edit_instruction))
        except AnswerError:
            raise first from None

    def _ask(self, messages: Sequence[Message], sampling: Sampling, max_tokens: int, stop: list[str] | None) -> str:
        return json_text.to_text(self._answer(messages, sampling, max_tokens, stop))

    def _answer(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        _check_settings(sampling, max_tokens)
        answer = self._say(messages, sampling, max_tokens, stop or DEFAULT_STOP)
        try:
            found = json_text.read_object(answer.text)
            json_text.check(found.value, answer.text)
        except AnswerError as error:
            raise AnswerError(error.problem, error.answer, _advice(answer, sampling, max_tokens)) from None
        if not answer.is_complete:
            lacking = [name for name in prompts.FIELDS if name not in found.value]
            log.warning(
                "the answer was cut off after %d tokens (max_tokens)%s: allow more",
                max_tokens,
                f" and lacks {', '.join(lacking)}" if lacking else "",
            )
        if found.mended:
            log.warning("the answer's JSON was mended: %s", ", ".join(found.mended))
        return found.value

    def _say(self, messages: Sequence[Message], sampling: Sampling, max_tokens: int, stop: Sequence[str]) -> Answer:
        inputs = self._processor(messages)
        longest = self._config.text_config.max_position_embeddings
        if len(inputs.ids) >= longest:
            raise UsageError(f"the prompt has {len(inputs.ids)} tokens, and the model reads {longest}: shorten it")
        decoder = self.decoder
        with timed("see the picture" if inputs.grids else "prepare the prompt"):
            prompt = decoder.prompt(inputs.ids, inputs.patches, inputs.grids)
        answer = generate(
            decoder,
            prompt,
            self._processor.tokenizer,
            sampling=sampling,
            max_tokens=min(max_tokens, longest - len(inputs.ids)),
            stop=stop,
            end_ids=self._end_ids,
            on_text=self.on_text,
        )
        if self.on_text is not None:
            self.on_text("\n")
        log.info("read the prompt: %.1f s, %d tokens", answer.prompt_seconds, len(inputs.ids))
        log.info("answer: %.1f s, %d tokens, %.1f per second", answer.seconds, len(answer.ids), answer.rate)
        return answer


def _advice(answer: Answer, sampling: Sampling, max_tokens: int) -> str:
    """What may help against an answer that cannot be used."""
    if not answer.is_complete:
        return f"it was cut off after {max_tokens} tokens; allow more (--max-tokens, max_tokens)"
    if sampling.temperature == 0:
        return "at a temperature of 0 it stays the same; say it in other words, or take a higher --temperature"
    return "try again with another seed"


def as_edit(value: Mapping[str, Any], *, instead: str | None = None) -> dict[str, Any]:
    """A structured prompt as FIBO-Edit takes it: scores among its aesthetics, nothing empty, and an instruction.

    Args:
        instead: the instruction to take where the answer has none.

    Raises:
        AnswerError: there is no instruction.
    """
    aesthetics = {**_SCORES, **value.get("aesthetics", {})}
    edited = _without_empty({**value, "aesthetics": aesthetics})
    said = edited.get("edit_instruction")
    if not isinstance(said, str) or not said.strip():
        instead = (instead or "").strip()
        if not instead:
            raise AnswerError("the model's answer has no edit_instruction", str(value))
        edited["edit_instruction"] = instead[0].upper() + instead[1:]
    return edited


def _without_empty(value: Any) -> Any:
    """Without members and items that are null, empty, or have become empty so."""
    if isinstance(value, Mapping):
        kept = {name: _without_empty(item) for name, item in value.items()}
        return {name: item for name, item in kept.items() if item not in (None, "", {}, [])}
    if isinstance(value, list):
        return [item for item in map(_without_empty, value) if item not in (None, "", {}, [])]
    return value


def _check_settings(sampling: Sampling, max_tokens: int) -> None:
    if not sampling.temperature >= 0:
        raise UsageError(f"a temperature of {sampling.temperature} makes no sense: 0 or more")
    if not 0 <= sampling.top_p <= 1:
        raise UsageError(f"a top_p of {sampling.top_p} makes no sense: 0 to 1")
    if sampling.seed is not None and not 0 <= sampling.seed < 2**64:
        raise UsageError(f"a seed of {sampling.seed} makes no sense: 0 to 2^64 - 1")
    if max_tokens < 1:
        raise UsageError(f"max_tokens of {max_tokens} makes no sense: 1 or more")

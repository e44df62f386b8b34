"""From a prompt to an answer, token by token."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Container, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from mflux.backend import mx

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mflux.models.common.networks.qwen3_vl import Qwen3VLForConditionalGeneration
    from mflux.models.common.networks.qwen_vl import Prompt

log = logging.getLogger(__name__)

# Prompt tokens that go through the language model at once: what its layers need meanwhile grows with them.
PREFILL = 512


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_p: only the likeliest tokens that together reach this probability may come (Holtzman et al. 2020,
            https://arxiv.org/abs/1904.09751); the likeliest always may.
        seed: the same seed gives the same answer; None draws one.
    """

    temperature: float = 0.2
    top_p: float = 0.9
    seed: int | None = None


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without special tokens, up to a stop string.
        ids: the tokens, the one that ended it included.
        is_complete: false if it was cut off after `max_tokens`.
        prompt_seconds: the time until the first token was there.
        seconds: the time for the others.
    """

    text: str
    ids: list[int]
    is_complete: bool
    prompt_seconds: float
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second, after the first."""
        return (len(self.ids) - 1) / self.seconds if self.seconds else 0.0


def likely_logits(logits: mx.array, top_p: float) -> tuple[mx.array, mx.array]:
    """Logits (V,) sorted from the likeliest down, those outside of `top_p` at minus infinity, and their tokens."""
    order = mx.argsort(-logits)
    logits = logits[order]
    probabilities = mx.softmax(logits)
    before = mx.cumsum(probabilities) - probabilities
    allowed = (before < top_p) | (mx.arange(len(order)) == 0)
    return mx.where(allowed, logits, -mx.inf), order


def choose(logits: mx.array, sampling: Sampling, key: mx.array) -> mx.array:
    """The next token, a scalar, from logits (V,)."""
    if sampling.temperature == 0:
        return mx.argmax(logits)
    logits, order = likely_logits(logits.astype(mx.float32) / sampling.temperature, sampling.top_p)
    return order[mx.random.categorical(logits, key=key)]


def generate_tokens(
    model: Qwen3VLForConditionalGeneration, prompt: Prompt, sampling: Sampling, *, prefill: int = PREFILL
) -> Generator[int]:
    """Tokens that continue a prompt, without end: the caller stops asking.

    The token after the one that is handed out is already being computed meanwhile.
    """
    seed = random.getrandbits(32) if sampling.seed is None else sampling.seed
    log.debug("seed %d", seed)
    key = mx.random.key(seed)
    decoder, cache = model.model.language_model, model.new_cache()
    hidden: mx.array | None = None
    for embeddings, positions, deepstack in prompt.parts(prefill):
        hidden = decoder(embeddings, positions, cache, deepstack)
        mx.eval([layer.arrays for layer in cache])
        mx.clear_cache()
    position = prompt.next_position

    def following(hidden: mx.array) -> mx.array:
        nonlocal key
        key, this = mx.random.split(key)
        token = choose(model.head(hidden[0, -1]), sampling, this)
        mx.async_eval(token)
        return token

    assert hidden is not None, "a prompt has parts"
    token = following(hidden)
    while True:
        embedding = decoder.embed_tokens(token[None])[None]
        after = following(decoder(embedding, mx.full((3, 1), position), cache))
        yield int(cast(int, token.item()))
        token, position = after, position + 1


def generate(
    model: Qwen3VLForConditionalGeneration,
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sampling: Sampling,
    max_tokens: int,
    stop: Sequence[str] = (),
    end_ids: Container[int] = (),
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Let a model answer.

    Args:
        max_tokens: where to cut it off.
        stop: the answer ends before the first of these, special tokens or any other text.
        end_ids: tokens that end it.
        on_text: gets the text piece by piece as it comes.
    """
    text = AnswerText(tokenizer, stop, on_text)
    ids: list[int] = []
    is_complete = False
    start = first = time.perf_counter()
    with closing(generate_tokens(model, prompt, sampling)) as tokens:
        while not is_complete and len(ids) < max_tokens:
            token = next(tokens)
            first = time.perf_counter() if not ids else first
            ids.append(token)
            is_complete = token in end_ids or text.add(token)
    return Answer(text.finish(), ids, is_complete, first - start, time.perf_counter() - first)


class AnswerText:
    """The text of an answer as its tokens come: special tokens count when stop strings are looked for, and are left
    out of what is said."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
    ):
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._stop = [word for word in stop if word]
        self._on_text = on_text
        self._pending: list[int] = []
        # Everything, the places of special tokens in it, and how much of it was handed out.
        self._text = ""
        self._silent: list[tuple[int, int]] = []
        self._handed_out = 0

    def add(self, token: int) -> bool:
        """Take in a token; true if the answer ends with it."""
        start = len(self._text)
        if token in self._special:
            self._flush()
            self._silent.append((len(self._text), len(self._text) + len(name := self._decode([token]))))
            self._text += name
        else:
            self._pending.append(token)
            # A character may take several tokens; until the last one it reads as a replacement character.
            if not self._decode(self._pending).endswith("\ufffd"):
                self._flush()
        has_ended = self._cut(start)
        self._hand_out(0 if has_ended else self._undecided())
        return has_ended

    def finish(self) -> str:
        """All that was said."""
        start = len(self._text)
        self._flush()
        self._cut(start)
        self._hand_out(0)
        return self._said(0, len(self._text))

    def _decode(self, ids: list[int]) -> str:
        # Of one list of tokens it is one text.
        return cast(str, self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _flush(self) -> None:
        if self._pending:
            self._text += self._decode(self._pending)
            self._pending.clear()

    def _cut(self, start: int) -> bool:
        """Drop the first stop string that reaches beyond `start`, and what follows it; true if there was one."""
        places = [self._text.find(word, max(0, start - len(word) + 1)) for word in self._stop]
        found = [place for place in places if place >= 0]
        if found:
            self._text = self._text[: min(found)]
        return bool(found)

    def _undecided(self) -> int:
        """How much of the end may be the beginning of a stop string."""
        beginnings = (word[:length] for word in self._stop for length in range(1, len(word)))
        return max((len(beginning) for beginning in beginnings if self._text.endswith(beginning)), default=0)

    def _said(self, start: int, stop: int) -> str:
        """The text between two places without special tokens."""
        said = []
        for silent_start, silent_stop in self._silent:
            said.append(self._text[start : min(silent_start, stop)])
            start = max(start, silent_stop)
        return "".join([*said, self._text[start:stop]])

    def _hand_out(self, undecided: int) -> None:
        ready = len(self._text) - undecided
        if self._on_text is not None and ready > self._handed_out:
            self._on_text(self._said(self._handed_out, ready))
            self._handed_out = ready

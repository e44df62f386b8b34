"""Prompts to token ids, with the `tokenizers` package and the files of a published model; no transformers.

Reference classes: transformers' `CLIPTokenizer` and `T5TokenizerFast`, id for id.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from mflux.backend import mx
from mflux.errors import CheckpointError

# Contractions, words, single digits, and runs of anything else that is not space (Radford et al. 2021).
_CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class PromptTokenizer:
    """Token ids of a fixed length: cut to fit with the end token kept, filled up with padding."""

    def __init__(self, tokenizer: Tokenizer, *, prefix: tuple[int, ...], end: int, pad: int):
        self._tokenizer = tokenizer
        self._prefix, self._end, self._pad = prefix, end, pad

    def encode(self, prompt: str, *, max_length: int) -> list[int]:
        """Ids of one prompt, exactly `max_length` of them."""
        return self._fit(self._ids(prompt), max_length)

    def __call__(self, prompt: str, *, max_length: int) -> mx.array:
        """Ids of one prompt as an array (1, max_length)."""
        return mx.array([self.encode(prompt, max_length=max_length)])

    def is_cut(self, prompt: str, *, max_length: int) -> bool:
        """Whether `encode` has to leave something of the prompt out."""
        return len(self._prefix) + len(self._ids(prompt)) + 1 > max_length

    def _ids(self, prompt: str) -> list[int]:
        return self._tokenizer.encode(prompt, add_special_tokens=False).ids

    def _fit(self, ids: list[int], length: int) -> list[int]:
        ids = [*self._prefix, *ids][: length - 1] + [self._end]
        return ids + [self._pad] * (length - len(ids))


def clip_tokenizer(folder: str | Path) -> PromptTokenizer:
    """CLIP's byte-level BPE from `vocab.json` and `merges.txt`.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    folder = Path(folder)
    vocabulary = _read_vocabulary(folder / "vocab.json")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    special |= _special_tokens(folder, special)
    try:
        tokenizer = Tokenizer(
            models.BPE(
                vocab=vocabulary,
                merges=_read_merges(folder / "merges.txt"),
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
                unk_token="<|endoftext|>",
                fuse_unk=False,
            )
        )
    except Exception as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens(list(dict.fromkeys(special.values())))
    start, end, pad = (_id_of(vocabulary, special[kind], folder) for kind in ("bos_token", "eos_token", "pad_token"))
    return PromptTokenizer(tokenizer, prefix=(start,), end=end, pad=pad)


def t5_tokenizer(folder: str | Path) -> PromptTokenizer:
    """T5's unigram model from `tokenizer.json`.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the folder is not a complete model in the diffusers layout")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = {"eos_token": "</s>", "pad_token": "<pad>"}
    special |= _special_tokens(folder, special)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    end, pad = (_id_of(vocabulary, special[kind], folder) for kind in ("eos_token", "pad_token"))
    return PromptTokenizer(tokenizer, prefix=(), end=end, pad=pad)


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the folder is not a complete model in the diffusers layout"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(vocabulary, dict) or not all(type(number) is int for number in vocabulary.values()):
        raise CheckpointError(f"{path} is damaged: it is not a table of token ids")
    return vocabulary


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the folder is not a complete model in the diffusers layout"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise CheckpointError(f"{path} is damaged: a line is not a pair of tokens")
    return pairs


def _special_tokens(folder: Path, wanted: dict[str, str]) -> dict[str, str]:
    """The special tokens that the folder's own configuration names; either spelling, plain or as a table."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    found = {}
    for kind in wanted:
        token = values.get(kind) if isinstance(values, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[kind] = token
    return found


def _id_of(vocabulary: dict[str, int], token: str, folder: Path) -> int:
    if token not in vocabulary:
        raise CheckpointError(f"{folder}: the special token {token} is not in the vocabulary")
    return vocabulary[token]

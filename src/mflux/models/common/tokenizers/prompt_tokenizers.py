"""Prompts to token ids, with the `tokenizers` package and the files of a published model; no transformers.

Reference classes: transformers' `CLIPTokenizer` and `T5TokenizerFast`, id for id.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from mflux.backend import mx
from mflux.checkpoints.folders import read_json
from mflux.checkpoints.readers.plain import read_text
from mflux.errors import CheckpointError
from mflux.models.common.tokenizers.checks import (
    check_pieces,
    check_prompt,
    check_time,
    check_tokenizer,
    check_vocabulary,
    has_strange_patterns,
    library_call,
)
from mflux.models.common.tokenizers.sentencepiece import GAPS, t5_content
from mflux.text import plain, shown

# Contractions, words, single digits, and runs of anything else that is not space (Radford et al. 2021).
_CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# In the order in which the reference adds them: of two that are the same text, the later one's flags hold.
_KINDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CLIP_SPECIAL = {"bos_token": "<|startoftext|>"} | dict.fromkeys(
    ("eos_token", "unk_token", "pad_token"), "<|endoftext|>"
)
_T5_SPECIAL = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


class PromptTokenizer:
    """Token ids of a fixed length: cut to fit with the end token kept, filled up with padding."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prefix: tuple[int, ...],
        end: int,
        pad: int,
        source: object = "the tokenizer",
        strange: bool = False,
    ):
        self._tokenizer = tokenizer
        self._source = source
        self._strange = strange
        self._prefix, self._end, self._pad = prefix, end, pad

    def encode(self, prompt: str, *, max_length: int) -> list[int]:
        """Ids of one prompt, exactly `max_length` of them."""
        return self._fit(self._ids(prompt), max_length)

    def __call__(self, prompt: str, *, max_length: int) -> mx.array:
        """Ids of one prompt as an array (1, max_length)."""
        return mx.array([self.encode(prompt, max_length=max_length)])

    def whole(self, prompt: str) -> list[int]:
        """Ids of one prompt, all of them, with the token that ends it."""
        return [*self._prefix, *self._ids(prompt), self._end]

    def is_cut(self, prompt: str, *, max_length: int) -> bool:
        """Whether `encode` has to leave something of the prompt out."""
        return len(self.whole(prompt)) > max_length

    def _ids(self, prompt: str) -> list[int]:
        return text_ids(self._tokenizer, prompt, self._source, strange=self._strange)

    def _fit(self, ids: list[int], length: int) -> list[int]:
        ids = [*self._prefix, *ids][: length - 1] + [self._end]
        return ids + [self._pad] * (length - len(ids))


class WholeTokenizer:
    """What `tokenizer.json` says, special tokens included, and nothing else."""

    def __init__(self, tokenizer: Tokenizer, source: object = "the tokenizer", *, strange: bool = False):
        self._tokenizer, self._source, self._strange = tokenizer, source, strange

    def encode(self, text: str, *, max_length: int) -> list[int]:
        """Ids of one text; what is too long is cut at its end, with the special tokens kept."""
        ids = self._ids(text)
        if len(ids) > max_length:
            self._tokenizer.enable_truncation(max_length)
            ids = self._ids(text)
            self._tokenizer.no_truncation()
        return ids

    def is_cut(self, text: str, *, max_length: int) -> bool:
        """Whether `encode` has to leave something of the text out."""
        return len(self._ids(text)) > max_length

    def _ids(self, text: str) -> list[int]:
        return text_ids(self._tokenizer, text, self._source, special=True, strange=self._strange)


def text_ids(
    tokenizer: Tokenizer,
    text: str,
    source: object = "the tokenizer",
    *,
    special: bool = False,
    strange: bool = False,
) -> list[int]:
    """Ids of a text, in whichever of its forms (see `plain`), however many they are.

    Args:
        special: add the tokens that the tokenizer's own template has.
        strange: the tokenizer has patterns of its own, see `check_time`.

    Raises:
        UsageError: it is not text, or longer than anyone needs.
        CheckpointError: the tokenizer's files were damaged in a way that only shows now.
    """
    check_prompt(text)
    text = plain(text)
    if strange:
        check_time(tokenizer, text, source)
    with library_call(source, "cannot read this prompt"):
        return tokenizer.encode(text, add_special_tokens=special).ids


def clip_tokenizer(folder: str | Path) -> PromptTokenizer:
    """CLIP's byte-level BPE from `vocab.json` and `merges.txt`, or where these are missing from `tokenizer.json`.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    folder = Path(folder)
    vocabulary, merges = read_bpe(folder)
    special, added = special_tokens(folder, _CLIP_SPECIAL)
    with library_call(folder):
        tokenizer = Tokenizer(
            models.BPE(
                vocab=vocabulary,
                merges=merges,
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
                unk_token=special["unk_token"],
                fuse_unk=False,
            )
        )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    with library_call(folder):
        tokenizer.add_special_tokens(added)
    start, end, pad = (id_of(vocabulary, special[kind], folder) for kind in ("bos_token", "eos_token", "pad_token"))
    return PromptTokenizer(tokenizer, prefix=(start,), end=end, pad=pad, source=folder)


def t5_tokenizer(folder: str | Path) -> PromptTokenizer:
    """T5's unigram model from `tokenizer.json`, or where that is missing from `spiece.model`.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    folder = Path(folder)
    path, other = folder / "tokenizer.json", folder / "spiece.model"
    if not path.is_file() and other.is_file():
        path = other
    content = t5_content(path) if path == other else read_json(path)
    check_tokenizer(content, path)
    if characters := _character_map(content.get("normalizer")):
        # Made from sentencepiece. The converter's generations wrote different rules for the space before a word; the
        # reference applies these to all of them.
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
        content["normalizer"] = characters
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]}
    with library_call(path):
        tokenizer = Tokenizer.from_str(json.dumps(content))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    special, added = special_tokens(folder, _T5_SPECIAL)
    if path == other:
        # What says so of itself, `tokenizer.json` has already.
        with library_call(path):
            gaps = [AddedToken(f"<extra_id_{number}>", special=True, normalized=False) for number in range(GAPS)]
            tokenizer.add_special_tokens([*added, *gaps])
    end, pad = (id_of(vocabulary, special[kind], folder) for kind in ("eos_token", "pad_token"))
    strange = has_strange_patterns(content)
    return PromptTokenizer(tokenizer, prefix=(), end=end, pad=pad, source=folder, strange=strange)


def whole_tokenizer(folder: str | Path) -> WholeTokenizer:
    """A tokenizer that stands in `tokenizer.json` as it is; transformers' `PreTrainedTokenizerFast`.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = Path(folder) / "tokenizer.json"
    content = read_json(path)
    check_tokenizer(content, path)
    with library_call(path):
        tokenizer = Tokenizer.from_str(json.dumps(content))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return WholeTokenizer(tokenizer, source=folder, strange=has_strange_patterns(content))


def _character_map(normalizer: object) -> dict | None:
    """The normalizer that sentencepiece compiled, alone or among others, from a `tokenizer.json`."""
    if not isinstance(normalizer, dict):
        return None
    several = normalizer.get("normalizers")
    for one in several if isinstance(several, list) else [normalizer]:
        if isinstance(one, dict) and one.get("type") == "Precompiled":
            return one
    return None


def read_bpe(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges. transformers 5 saves them inside tokenizer.json only."""
    if (folder / "vocab.json").is_file() or not (folder / "tokenizer.json").is_file():
        return _read_vocabulary(folder / "vocab.json"), _read_merges(folder / "merges.txt")
    path = folder / "tokenizer.json"
    content = read_json(path)
    check_tokenizer(content, path)
    try:
        vocabulary = {str(token): int(number) for token, number in content["model"]["vocab"].items()}
        vocabulary |= {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        # Older versions wrote a merge as two words, newer ones write a pair.
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in content["model"]["merges"]]
        if not all(len(pair) == 2 for pair in merges):
            raise ValueError
        check_pieces((half for pair in merges for half in pair), path)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path} is damaged: it holds no byte-level BPE; fetch it again") from None
    return vocabulary, merges


def _read_vocabulary(path: Path) -> dict[str, int]:
    vocabulary = read_json(path)
    check_vocabulary(vocabulary, path)
    return vocabulary


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = read_text(path).split("\n")
    pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise CheckpointError(f"{path} is damaged: a line is not a pair of tokens")
    check_pieces((half for pair in pairs for half in pair), path)
    return [(first, second) for first, second in pairs]


def special_tokens(folder: Path, usual: dict[str, str]) -> tuple[dict[str, str], list[AddedToken]]:
    """What the folder's own configuration says of tokens that are matched before a prompt is split.

    `tokenizer_config.json` names them by kind, plain or as a table with flags, and may list all of them with their
    flags. Where it lists none, `tokenizer.json` may, and `special_tokens_map.json` has the last word on kinds.

    Returns:
        The special tokens by kind, and all tokens with their flags in the order in which to add them.
    """
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    listed = settings.get("added_tokens_decoder")
    older = folder / "special_tokens_map.json"
    if listed is None and older.is_file():
        settings = settings | read_json(older)
    whole = folder / "tokenizer.json"
    try:
        if listed is None and whole.is_file():
            listed = {str(table["id"]): table for table in read_json(whole).get("added_tokens") or ()}
        known = {table["content"]: _added_token(table) for _, table in sorted((listed or {}).items(), key=_number)}
        kinds = usual | {kind: value for kind in _KINDS if (value := settings.get(kind)) is not None}
        tokens = {kind: _added_token(value) for kind, value in kinds.items()}
    except (TypeError, KeyError, ValueError, AttributeError):
        raise CheckpointError(f"{folder} is damaged: its special tokens are not what they should be") from None
    check_pieces([*known, *(token.content for token in tokens.values())], folder)
    special = {kind: token.content for kind, token in tokens.items()}
    order = [known.get(tokens[kind].content, tokens[kind]) for kind in _KINDS if kind in tokens]
    return special, [*known.values(), *order]


def _added_token(value: str | dict) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    flags = {name: bool(value[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value}
    return AddedToken(value["content"], special=True, **flags)


def _number(entry: tuple[str, object]) -> int:
    return int(entry[0])


def id_of(vocabulary: dict[str, int], token: str, folder: Path) -> int:
    if token not in vocabulary:
        raise CheckpointError(f"{folder}: the special token {shown(token)} is not in the vocabulary")
    return vocabulary[token]

"""Prompts to token ids for Qwen's language models, and the turns of a conversation that they are wrapped in.

Reference class: transformers' `Qwen2Tokenizer`, which Qwen2.5 and Qwen3 use as well, id for id.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from mflux.backend import mx
from mflux.checkpoints.folders import read_json
from mflux.errors import CheckpointError
from mflux.models.common.tokenizers.checks import library_call
from mflux.models.common.tokenizers.prompt_tokenizers import id_of, read_bpe, special_tokens, text_ids
from mflux.text import shown

# Contractions; words with the space or sign before them; single digits; signs with the line breaks after them; line
# breaks; spaces, of which the last goes with what follows.
_SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_SPECIAL = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
_START, _END = "<|im_start|>", "<|im_end|>"
# Qwen-Image and Krea 2 were trained with exactly this turn before each prompt; so many tokens of what comes out are the
# template's, up to the prompt.
DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
DESCRIBE_TOKENS = 34


def chat(prompt: str, *, system: str | None = None, think: bool = True) -> str:
    """A user's turn, and the beginning of the answer, as Qwen3's chat template has them.

    Args:
        prompt: as it is; nothing is stripped, and special tokens in it are special.
        system: a turn of its own before it. None for none: Qwen3 has no usual one.
        think: false puts an empty block of thoughts at the beginning of the answer, which keeps the model from having
            any.
    """
    before = "" if system is None else f"{_START}system\n{system}{_END}\n"
    thoughts = "" if think else "<think>\n\n</think>\n\n"
    return f"{before}{_START}user\n{prompt}{_END}\n{_START}assistant\n{thoughts}"


class QwenTokenizer:
    """Token ids of several texts, cut at the end to fit, and padded at the end to equal length."""

    def __init__(self, tokenizer: Tokenizer, *, pad: int):
        self._tokenizer = tokenizer
        self.pad = pad

    def encode(self, text: str, *, max_length: int | None = None) -> list[int]:
        """Ids of one text, at most `max_length` of them.

        Raises:
            UsageError: it is not UTF-8 text, or of an absurd length.
        """
        return text_ids(self._tokenizer, text)[:max_length]

    def __call__(
        self, texts: Sequence[str], *, max_length: int, pad_to_longest: bool = False
    ) -> tuple[mx.array, mx.array]:
        """Ids and attention mask of several texts, (B, max_length) each.

        Args:
            texts: with their turns around them, see `chat`.
            max_length: what follows is cut off.
            pad_to_longest: pad only to the longest of the texts.

        Returns:
            Ids, and 1 where one belongs to the text, 0 where it is padding.

        Raises:
            UsageError: as for `encode`.
        """
        rows = [self.encode(text, max_length=max_length) for text in texts]
        length = max(map(len, rows)) if pad_to_longest else max_length
        ids = [row + [self.pad] * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        return mx.array(ids, dtype=mx.int32), mx.array(mask, dtype=mx.int32)

    def is_cut(self, text: str, *, max_length: int) -> bool:
        """Whether so many ids have to leave something of the text out."""
        return len(self.encode(text)) > max_length


def qwen_tokenizer(folder: str | Path) -> QwenTokenizer:
    """Qwen's byte-level BPE from `vocab.json` and `merges.txt`, or where these are missing from `tokenizer.json`.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    folder = Path(folder)
    vocabulary, merges = read_bpe(folder)
    special, added = special_tokens(folder, _SPECIAL)
    with library_call(folder):
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False))
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.add_special_tokens(added)
    known = tokenizer.get_vocab(with_added_tokens=True)
    for token in (_START, _END):
        id_of(known, token, folder)
    for token, number in _listed(folder / "tokenizer_config.json").items():
        if known.get(token) != number:
            # Their own numbers are not taken over: tokens that are added get the ones after the vocabulary.
            raise CheckpointError(
                f"{folder} is damaged: the token {shown(token)} would be {known.get(token)}, and "
                f"tokenizer_config.json says {number}; fetch the folder again"
            )
    return QwenTokenizer(tokenizer, pad=id_of(known, special["pad_token"], folder))


def _listed(path: Path) -> dict[str, int]:
    """Added tokens and the ids that `tokenizer_config.json`, which was read without complaint before, has for them."""
    listed = (read_json(path) if path.is_file() else {}).get("added_tokens_decoder") or {}
    return {table["content"]: int(number) for number, table in listed.items()}

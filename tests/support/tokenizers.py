"""One writer for each kind of tokenizer that models come with, as small as a test wants it.

Each writes the files of a published repository and returns all tokens with their ids. What stands in a vocabulary is an
argument: `spelled` and `spelled_pieces` need no training; `trained` and `sentencepiece` know more of a language's ways.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = ("a", "red", "blue", "green", "circle", "square", "on", "white", "black", "background", "large", "small")
CORPUS = (
    "a photo of a cat sitting on the mat, highly detailed, 4k",
    "the quick brown fox jumps over the lazy dog's back and they'll say it's fine",
    "an oil painting of a naïve café in Zürich, été, piñata, façade",
    "a red circle on a white background, blue square, green triangle",
    "猫の写真 красная площадь 한국어 שלום 1234567890 !?.,;:'\"()[]{}<>|@#$%^&*-_=+~`/\\",
)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}

Pairs = Sequence[tuple[str, str]]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def numbered(tokens: Iterable[str], first: int = 0) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens, first)}


# ---- pairs of bytes: CLIP, Qwen, SmolLM


def spelled(words: Iterable[str] = WORDS, end: str = "") -> Pairs:
    """The pairs that make each word from its left; `end` follows a word's last letter."""
    pairs: dict[tuple[str, str], None] = {}
    for word in words:
        whole, *letters = [*word[:-1], word[-1] + end]
        for letter in letters:
            pairs[whole, letter] = None
            whole += letter
    return list(pairs)


def trained(corpus: Iterable[str], size: int, end: str = "") -> Pairs:
    """The pairs that a tokenizer of `size` tokens learns from texts; with `end`, from texts in lower case."""
    return [tuple(pair) for pair in json.loads(_train(corpus, size, end).to_str())["model"]["merges"]]


def _train(corpus: Iterable[str], size: int, end: str = "") -> Tokenizer:
    suffix = {"end_of_word_suffix": end} if end else {}
    tokenizer = Tokenizer(models.BPE(**suffix))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if end:
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), tokenizer.pre_tokenizer])
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=1, initial_alphabet=ALPHABET, show_progress=False, **suffix
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def _write_pairs(folder: Path, pairs: Pairs, alphabet: Sequence[str], special: Sequence[str] = ()) -> dict[str, int]:
    vocabulary = numbered(dict.fromkeys([*alphabet, *("".join(pair) for pair in pairs), *special]))
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return vocabulary


def write_clip_tokenizer(
    folder: Path, *, pairs: Pairs | None = None, length: int = 24, config: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """CLIP's `vocab.json`, `merges.txt` and configuration; the end token has the highest id."""
    alphabet = [*ALPHABET, *(letter + "</w>" for letter in ALPHABET)]
    pairs = spelled(end="</w>") if pairs is None else pairs
    vocabulary = _write_pairs(folder, pairs, alphabet, ("<|startoftext|>", "<|endoftext|>"))
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "do_lower_case": True,
        "model_max_length": length,
    }
    write_json(folder / "tokenizer_config.json", settings | dict(config or {}))
    return vocabulary


# One user's turn of Qwen3's template, with and without thinking; `chat` is compared with the whole of it in
# tests/parity/test_qwen_tokenizer.py.
_QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
QWEN3_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
QWEN_VL_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip


def write_qwen_tokenizer(
    folder: Path, *, pairs: Pairs | None = None, added: Sequence[str] = QWEN3_SPECIAL, **config: Any
) -> dict[str, int]:
    """Qwen's `vocab.json`, `merges.txt` and configuration, which alone lists the added tokens."""
    vocabulary = _write_pairs(folder, spelled() if pairs is None else pairs, ALPHABET)
    ids = numbered(added, len(vocabulary))
    settings = {
        "added_tokens_decoder": {
            # As published: "<think>" and its like are not special.
            str(number): {"content": token, "special": token.startswith("<|"), **FLAGS}
            for token, number in ids.items()
        },
        "chat_template": _QWEN_TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", settings | config)
    return vocabulary | ids


def write_whole_tokenizer(
    folder: Path, corpus: Iterable[str], *, size: int, special: Sequence[str], start: str | None = None, **config: Any
) -> Tokenizer:
    """Everything in `tokenizer.json`, as SmolLM's and Qwen3-VL's repositories have it; `start` begins every text."""
    tokenizer = _train(corpus, size)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    if start is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config)
    return tokenizer


# ---- pieces with scores: T5

Pieces = Sequence[tuple[str, float]]


def spelled_pieces(words: Iterable[str] = WORDS) -> Pieces:
    """Words and single letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -3.0 - number / 10) for number, word in enumerate(words)]
    return pieces + [(letter, -8.0 - number / 10) for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz")]


@cache
def sentencepiece(size: int = 300) -> tuple[Pieces, bytes]:
    """Pieces with their scores, and the compiled character map (NFKC, with T5's treatment of spaces)."""
    from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 10),
        model_writer=model,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        vocab_size=size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    parsed = sentencepiece_model_pb2.ModelProto()
    parsed.ParseFromString(model.getvalue())
    pieces = [(piece.piece, 0.0 if number < 3 else piece.score) for number, piece in enumerate(parsed.pieces)]
    return pieces, parsed.normalizer_spec.precompiled_charsmap


# Two forms of tokenizer.json are about, from two generations of the converter from sentencepiece.
T5_FORMS = ("whitespace", "strip")


def write_t5_tokenizer(
    folder: Path,
    *,
    pieces: Pieces | None = None,
    characters: bytes | None = None,
    form: str = "whitespace",
    extra: int = 0,
    configured: bool = False,
) -> dict[str, int]:
    """T5's `tokenizer.json`.

    Args:
        pieces: those of `WORDS` unless given.
        characters: sentencepiece's own character map.
        form: one of `T5_FORMS`.
        extra: how many tokens stand for gaps in a text; published models have 100.
        configured: whether a configuration stands beside it, which then alone says what the special tokens are.
    """
    metaspace = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    steps = (
        [{"type": "Precompiled", "precompiled_charsmap": base64.b64encode(characters).decode()}] if characters else []
    )
    if form == "whitespace":
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]}
    else:
        pre_tokenizer = metaspace | {"prepend_scheme": "first"}
        steps.append({"type": "Strip", "strip_left": False, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"})
    gaps = [f"<extra_id_{number}>" for number in reversed(range(extra))]
    vocabulary = [*(spelled_pieces() if pieces is None else pieces), *((token, 0.0) for token in gaps)]
    ids = numbered(token for token, _ in vocabulary)
    special = {ids[token]: {"content": token, "special": True, **FLAGS} for token in ("<pad>", "</s>", "<unk>", *gaps)}
    text, end = (
        ({"Sequence": {"id": name, "type_id": 0}} for name in "AB"),
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    )
    first, second = text
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, **token} for number, token in special.items()],
        "normalizer": {"type": "Sequence", "normalizers": steps} if len(steps) > 1 else (steps or [None])[0],
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, end],
            "pair": [first, end, second, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [ids["</s>"]], "tokens": ["</s>"]}},
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": ids["<unk>"], "vocab": vocabulary, "byte_fallback": False},
    }
    write_json(folder / "tokenizer.json", content)
    if configured:
        settings = {
            "tokenizer_class": "T5Tokenizer",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "extra_ids": extra,
            "additional_special_tokens": gaps[::-1],
            "added_tokens_decoder": {str(number): token for number, token in special.items()},
            "model_max_length": 512,
        }
        write_json(folder / "tokenizer_config.json", settings)
    return ids


def write_trained_clip_tokenizer(folder: Path, *, length: int = 77, **options: Any) -> dict[str, int]:
    """A CLIP tokenizer that knows `CORPUS`, for the tests that compare ids with the reference's."""
    return write_clip_tokenizer(folder, pairs=_clip_pairs(), length=length, **options)


@cache
def _clip_pairs() -> Pairs:
    return trained(CORPUS, 1000, end="</w>")


def write_trained_t5_tokenizer(folder: Path, *, form: str = "whitespace") -> dict[str, int]:
    """A T5 tokenizer that knows `CORPUS` and has all that a published one has."""
    pieces, characters = sentencepiece()
    return write_t5_tokenizer(folder, pieces=pieces, characters=characters, form=form, extra=100, configured=True)

"""Published vocabularies through our readers, id for id as transformers has them from the same files.

Three come in packages of the registry, which the tests install without what those need (Makefile): CLIP's in
open_clip_torch, Qwen's in dashscope (the ranks of Qwen2 to Qwen3), Mistral's tekken in mistral_common. They are
written here as repositories have them; nothing of them stands in this one.
"""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
import random
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
from support.tokenizers import FLAGS, QWEN_VL_SPECIAL, write_json
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerFast

from mflux.models.common.tokenizers.prompt_tokenizers import clip_tokenizer, whole_tokenizer
from mflux.models.common.tokenizers.qwen import qwen_tokenizer
from mflux.text import plain
from parity.test_qwen_tokenizer import PROMPTS

# Of what prompts are made of.
WORDS = (
    "a photo of the cat", "naïve café", "Zürich", "nai\u0308ve", "猫の写真", "一张猫的照片，寿司", "한국어 텍스트",
    "красная площадь", "שלום", "مرحبا بالعالم", "नमस्ते", "สวัสดี", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🐱🎨",
    "def f(x: int) -> str:\n\treturn f'{x!r}'", "<div class=\"a\">&nbsp;</div>", "x = [i**2 for i in range(10)]",
    "https://example.org/a?b=c#d", "1234567890", "3.14", "½ ① Ⅷ ٣", "don't WE'VE 's", "\n", "\r\n", "\n\n", "\t", "   ",
    "\u3000", "\u00a0", "\u200d", "…", "—", "?!", "--", "masterpiece, best quality, (8k:1.2)", "(((red)))", "BREAK",
    "Donaudampfschifffahrtsgesellschaftskapitänsmütze", "pneumonoultramicroscopicsilicovolcanoconiosis", "x" * 80,
    "ﬁ ℌ ｆｕｌｌ", "<|im_end|>", "<|endoftext|>", "[INST]", "_ __ a_b", "CamelCaseWord", "ALL CAPS",
)  # fmt: skip


def prompts(count: int) -> list[str]:
    """The odd ones of the small vocabularies' tests, and as many mixtures of `WORDS`."""
    chance = random.Random(27)
    mixed = [
        chance.choice((" ", "", ", ", "\n")).join(chance.choices(WORDS, k=chance.randint(1, 12))) for _ in range(count)
    ]
    return [*PROMPTS, *mixed, " ".join(WORDS) * 40]


MANY = prompts(2000)


def file_of(package: str, name: str) -> Path:
    """A file of an installed package, which is not imported: what it needs is not there."""
    found = importlib.util.find_spec(package)
    assert found is not None, f"{package} is missing: make test installs it"
    return Path(found.submodule_search_locations[0]) / name


def letters() -> dict[int, str]:
    """The character that stands for each byte in GPT-2's vocabularies and all that followed."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}


LETTERS = letters()


def spelled(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """The pair that each token of several bytes was merged from: its last two parts, merged in the order of ranks."""
    found = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        parts = [token[number : number + 1] for number in range(len(token))]
        while len(parts) > 2:
            joined = map(b"".join, pairwise(parts))
            best, number = min((ranks.get(pair, rank), number) for number, pair in enumerate(joined))
            if best >= rank:
                break
            parts[number : number + 2] = [parts[number] + parts[number + 1]]
        assert len(parts) == 2, token
        found.append((spelled(parts[0]), spelled(parts[1])))
    return found


def write_pairs(folder: Path, vocabulary: Mapping[str, int], merges: list[tuple[str, str]]) -> None:
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- CLIP


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    with gzip.open(file_of("open_clip", "bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as stream:
        lines = stream.read().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    alphabet = list(LETTERS.values())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    assert len(tokens) == 49408
    write_pairs(folder, {token: number for number, token in enumerate(tokens)}, merges)
    listed = {
        "49406": FLAGS | {"content": "<|startoftext|>", "normalized": True, "special": True},
        "49407": FLAGS | {"content": "<|endoftext|>", "normalized": False, "special": True},
    }
    special = {
        "bos_token": "<|startoftext|>",
        **dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
    }
    settings = {"added_tokens_decoder": listed, "do_lower_case": True, "model_max_length": 77, **special}
    write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": "CLIPTokenizer"})
    return clip_tokenizer(folder), CLIPTokenizer.from_pretrained(folder)


def test_clip(clip):
    ours, theirs = clip
    assert ours.encode("a photo of a cat", max_length=77)[:7] == [49406, 320, 1125, 539, 320, 2368, 49407]
    for prompt in MANY:
        expected = theirs(plain(prompt), padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.encode(prompt, max_length=77) == expected, prompt


# ---- Qwen


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    lines = file_of("dashscope", "resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    assert len(ranks) == 151643
    write_pairs(folder, {spelled(token): rank for token, rank in ranks.items()}, merges_of(ranks))
    added = {
        str(151643 + number): FLAGS | {"content": token, "special": True}
        for number, token in enumerate(QWEN_VL_SPECIAL)
    }
    settings = {"added_tokens_decoder": added, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": "Qwen2Tokenizer"})
    return qwen_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def test_qwen(qwen):
    ours, theirs = qwen
    assert ours.encode("a photo of a cat") == [64, 6548, 315, 264, 8251]
    longest = 0
    for prompt in MANY:
        found = ours.encode(prompt)
        assert found == theirs(plain(prompt)).input_ids, prompt
        longest = max(longest, len(found))
    assert longest > 5000


@pytest.mark.parametrize("length", [1, 16, 512, 5000])
def test_qwen_cut_and_padded(qwen, length):
    ours, theirs = qwen
    for prompt in (*MANY[::40], MANY[-1]):
        options = {"padding": "max_length", "truncation": True, "padding_side": "right"}
        expected = theirs([plain(prompt)], max_length=length, **options)
        ids, mask = ours([prompt], max_length=length)
        assert (ids.tolist(), mask.tolist()) == (expected.input_ids, expected.attention_mask), prompt


# ---- Mistral's tekken, in one file as ERNIE-Image's repository has it


@pytest.fixture(scope="module")
def tekken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tekken")
    content = json.loads(file_of("mistral_common", "data/tekken_240911.json").read_bytes())
    config = content["config"]
    first = config["default_num_special_tokens"]
    tokens = content["vocab"][: config["default_vocab_size"] - first]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in tokens}
    assert first == 1000 and len(ranks) == 130072
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<SPECIAL_{number}>": number for number in range(3, first)}}
    vocabulary |= {spelled(token): first + rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges_of(ranks), ignore_merges=True))
    split = pre_tokenizers.Split(Regex(config["pattern"]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return whole_tokenizer(folder), PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")), ranks


def test_tekken(tekken):
    ours, theirs, ranks = tekken
    assert not ours._strange, "each prompt would be tried in a process of its own first: seconds, with such a file"
    for prompt in MANY:
        found = ours.encode(prompt, max_length=100_000)
        assert found == theirs(plain(prompt)).input_ids, prompt
        # Special tokens aside, the bytes are the text's own.
        if not any(number < 1000 for number in found):
            text = theirs.decode(found, clean_up_tokenization_spaces=False)
            assert text == plain(prompt)
    assert [spelled(token) for token in list(ranks)[256:259]] == [
        theirs.convert_ids_to_tokens(n) for n in range(1256, 1259)
    ]


@pytest.mark.parametrize("length", [1, 512])
def test_tekken_cut(tekken, length):
    ours, theirs, _ = tekken
    for prompt in MANY[-8:]:
        assert (
            ours.encode(prompt, max_length=length)
            == theirs(plain(prompt), max_length=length, truncation=True).input_ids
        )

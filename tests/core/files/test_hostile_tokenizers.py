"""Tokenizers from strangers: nothing that they hold ends in a panic, a killed process or a raw error."""

from __future__ import annotations

import base64
import json
import random
import struct
import subprocess
import sys

import pytest
from support.tokenizers import write_clip_tokenizer, write_qwen_tokenizer, write_t5_tokenizer

from mflux.errors import CheckpointError, MfluxError, UsageError
from mflux.models.common.tokenizers import checks
from mflux.models.common.tokenizers.checks import LONGEST_PROMPT, check_character_map, library_call
from mflux.models.common.tokenizers.prompt_tokenizers import clip_tokenizer, t5_tokenizer
from mflux.models.common.tokenizers.qwen import qwen_tokenizer


@pytest.fixture
def clip(tmp_path):
    write_clip_tokenizer(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def t5(tmp_path):
    write_t5_tokenizer(tmp_path / "t5")
    return tmp_path / "t5"


def change(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def character_map(units=None, texts=b"\0b\0"):
    """A table that turns "a" into "b": a root, the unit that "a" leads to, and the value below it."""
    if units is None:
        units = [0] * 256
        units[0] = 0
        units[ord("a")] = ord("a") | 1 << 8 | 1 << 10
        units[ord("a") ^ 1] = 1 << 31 | 1
    raw = struct.pack(f"<{len(units)}I", *units)
    return base64.b64encode(struct.pack("<I", len(raw)) + raw + texts).decode()


def precompiled(table):
    return lambda content: content.update(normalizer={"type": "Precompiled", "precompiled_charsmap": table})


def test_a_sound_table_of_characters_is_followed(t5):
    plain = t5_tokenizer(t5).encode("b", max_length=4)
    assert t5_tokenizer(t5).encode("a", max_length=4) != plain
    change(t5 / "tokenizer.json", precompiled(character_map()))
    assert t5_tokenizer(t5).encode("a", max_length=4) == plain


BROKEN = {
    "text": "no base64!",
    "number": 5,
    "short": base64.b64encode(b"\x04\0\0\0").decode(),
    "length": base64.b64encode(struct.pack("<I", 1 << 30) + bytes(64)).decode(),
    "odd": base64.b64encode(struct.pack("<I", 7) + bytes(64)).decode(),
    "few units": character_map([0] * 255),
    "leads outside": character_map([1 << 30] * 256),
    "value outside": character_map([0] * 96 + [1 << 31 | 99, 97 | 1 << 8 | 1 << 10] + [0] * 158),
    "no end": character_map(texts=b"b"),
    "not text": character_map(texts=b"\xff\0"),
    "inside a letter": character_map(texts="ä".encode() + b"\0"),
}


@pytest.mark.parametrize("table", BROKEN.values(), ids=BROKEN)
def test_a_damaged_table_of_characters(t5, table):
    change(t5 / "tokenizer.json", precompiled(table))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged: its table of characters makes no sense"):
        t5_tokenizer(t5)


def test_mutated_tables_of_characters_never_reach_the_library_unchecked(t5):
    """In a process of its own: what gets past the check must not end it."""
    change(t5 / "tokenizer.json", precompiled("PLACE"))
    program = f"""
import base64, json, random, sys
from pathlib import Path
from mflux.errors import MfluxError
from mflux.models.common.tokenizers.prompt_tokenizers import t5_tokenizer
path = Path({str(t5)!r}) / "tokenizer.json"
content = path.read_text()
sound = base64.b64decode({character_map()!r})
draw = random.Random(1)
passed = 0
for _ in range(400):
    data = bytearray(sound)
    for _ in range(draw.randint(1, 4)):
        place = draw.choice([draw.randrange(len(data)), 4 + 4 * 97 + draw.randrange(4), draw.randrange(4)])
        data[place] = draw.randrange(256)
    path.write_text(content.replace("PLACE", base64.b64encode(bytes(data)).decode()))
    try:
        t5_tokenizer(path.parent).encode("a red aa circle", max_length=8)
        passed += 1
    except MfluxError:
        pass
print(passed)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "panicked" not in done.stderr
    assert 0 < int(done.stdout) < 400


def test_texts_that_would_grow_without_end(t5):
    change(t5 / "tokenizer.json", precompiled(character_map(texts=b"\0" + b"b" * 1000 + b"\0")))
    with pytest.raises(CheckpointError, match="grow without end"):
        t5_tokenizer(t5)
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}
    change(t5 / "tokenizer.json", lambda content: content.update(normalizer=replace))
    with pytest.raises(CheckpointError, match="grow without end"):
        t5_tokenizer(t5)
    several = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": ""}, "content": "a"}] * 40}
    change(t5 / "tokenizer.json", lambda content: content.update(normalizer=several))
    with pytest.raises(CheckpointError, match="grow without end"):
        t5_tokenizer(t5)


def test_endless_pieces(t5, clip):
    change(t5 / "tokenizer.json", lambda content: content["model"]["vocab"].append(["x" * 5_000_000, -1.0]))
    with pytest.raises(CheckpointError, match="a piece of its vocabulary has 5,000,000 characters"):
        t5_tokenizer(t5)
    merges = (clip / "merges.txt").read_text()
    (clip / "merges.txt").write_text(merges + "a " + "b" * 5_000_000 + "\n")
    with pytest.raises(CheckpointError, match="a piece of its vocabulary has 5,000,000 characters"):
        clip_tokenizer(clip)
    (clip / "merges.txt").write_text(merges)
    change(clip / "vocab.json", lambda content: content.update({"x" * 5_000_000: 1}))
    with pytest.raises(CheckpointError, match="a piece of its vocabulary has 5,000,000 characters"):
        clip_tokenizer(clip)


def test_a_panic_is_a_sentence(t5):
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    change(t5 / "tokenizer.json", lambda content: content.update(pre_tokenizer=pattern))
    with pytest.raises(CheckpointError, match="cannot read this prompt: Onig"):
        t5_tokenizer(t5).encode("a" * 60 + "!", max_length=8)


def test_only_panics_are_caught():
    with pytest.raises(KeyboardInterrupt), library_call("x"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("prompt", "told"), [("a" * (LONGEST_PROMPT + 1), "100,001 characters"), ("\ud800", "UTF-8"), (None, "is a text")]
)
def test_prompts_that_no_tokenizer_is_given(t5, clip, prompt, told):
    for tokenizer in (t5_tokenizer(t5), clip_tokenizer(clip)):
        with pytest.raises(UsageError, match=told):
            tokenizer.encode(prompt, max_length=8)
    assert len(tokenizer.encode("a" * LONGEST_PROMPT, max_length=8)) == 8


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_byte_order_mark_changes_nothing(clip, name):
    plain = clip_tokenizer(clip).encode("a red circle", max_length=8)
    (clip / name).write_bytes(b"\xef\xbb\xbf" + (clip / name).read_bytes())
    assert clip_tokenizer(clip).encode("a red circle", max_length=8) == plain


HOSTILE = [None, True, -1, 2**31, 2**70, 1.5, 1e300, "x", "", "\ud800", [], [[]], {}, {"": None}, "(a+)+$"]


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:6]:
        yield from places(item, (*path, key))


def put(value, path, item):
    if not path:
        return item
    *steps, last = path
    inner = value
    for step in steps:
        inner = inner[step]
    inner[last] = item
    return value


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"])
def test_every_value_exchanged(t5, clip, name):
    folder, read = (clip, clip_tokenizer) if (clip / name).exists() and name != "tokenizer.json" else (t5, t5_tokenizer)
    path = folder / name
    if not path.exists():
        special = {"pad_token": {"content": "<pad>", "special": True, "lstrip": False}, "eos_token": "</s>"}
        path.write_text(json.dumps(special))
    sound = path.read_text()
    outcomes = set()
    draw = random.Random(name)
    for place in places(json.loads(sound)):
        for hostile in draw.sample(HOSTILE, 6):
            path.write_text(json.dumps(put(json.loads(sound), place, hostile)))
            try:
                read(folder).encode("a red circle", max_length=8)
                outcomes.add("read")
            except MfluxError as error:
                outcomes.add("refused")
                assert str(error).isprintable()
    assert "refused" in outcomes


def test_an_added_token_without_letters(tmp_path):
    """The library leaves it out without a word."""
    write_qwen_tokenizer(tmp_path)

    def empty(content):
        first = next(iter(content["added_tokens_decoder"]))
        content["added_tokens_decoder"][first]["content"] = ""

    change(tmp_path / "tokenizer_config.json", empty)
    with pytest.raises(CheckpointError, match="is damaged: the token  would be None, and tokenizer_config.json says"):
        qwen_tokenizer(tmp_path)


def test_no_table_is_no_fault():
    check_character_map(None, "x")
    check_character_map("", "x")


def steps_of(patterns):
    steps = [{"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False} for one in patterns]
    return {"type": "Sequence", "pretokenizers": steps}


def test_patterns_that_come_to_no_end(t5, monkeypatch):
    """One is bounded by the library; each of several at each place of a prompt is not."""
    monkeypatch.setattr(checks, "PATIENCE_S", 1)
    change(t5 / "tokenizer.json", lambda content: content.update(pre_tokenizer=steps_of(["a*a*a*(?!a|$)"] * 8)))
    tokenizer = t5_tokenizer(t5)
    with pytest.raises(CheckpointError, match="its patterns took more than 1 seconds with this prompt"):
        tokenizer.encode("a" * 200, max_length=8)


def test_patterns_of_ones_own_that_come_to_an_end(t5):
    plain = t5_tokenizer(t5).encode("red circle", max_length=8)
    content = json.loads((t5 / "tokenizer.json").read_text())
    assert not checks.has_strange_patterns(content)
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [steps_of(["zzz"]), content["pre_tokenizer"]]}
    (t5 / "tokenizer.json").write_text(json.dumps(content))
    assert checks.has_strange_patterns(content)
    assert t5_tokenizer(t5).encode("red circle", max_length=8) == plain


def test_steps_without_end(t5):
    change(t5 / "tokenizer.json", lambda content: content.update(pre_tokenizer=steps_of([r"\\s+"] * 40)))
    with pytest.raises(CheckpointError, match="more than 32 steps"):
        t5_tokenizer(t5)


def template(single, pair=(), tokens=None):
    return {"type": "TemplateProcessing", "single": single, "pair": list(pair), "special_tokens": tokens or {}}


def in_sequence(kind, steps):
    return {"type": "Sequence", kind: steps}


WHOLE = {"Sequence": {"id": "A", "type_id": 0}}
SECOND = {"Sequence": {"id": "B", "type_id": 0}}
END = {"SpecialToken": {"id": "</s>", "type_id": 0}}
MANY_IDS = {"</s>": {"id": "</s>", "ids": [1] * 100_000, "tokens": ["</s>"] * 100_000}}
PREPEND = {"type": "Prepend", "prepend": "\u2581"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GROWS = {
    "the prompt 20,000 times": ("post_processor", template([WHOLE] * 20_000)),
    "the prompt some times": ("post_processor", template([WHOLE] * 5)),
    "the prompt doubled again and again": ("post_processor", in_sequence("processors", [template([WHOLE] * 2)] * 5)),
    "a template of ends": ("post_processor", template([WHOLE, *[END] * 100_000])),
    "a template for two texts": ("post_processor", template([WHOLE], [WHOLE] * 50_000)),
    "an end of many tokens": ("post_processor", template([WHOLE, END], tokens=MANY_IDS)),
    "a long beginning": ("normalizer", PREPEND | {"prepend": "x" * 5_000_000}),
    "a beginning of a word": ("normalizer", PREPEND | {"prepend": "x" * 900}),
    "many beginnings": ("normalizer", in_sequence("normalizers", [PREPEND] * 20)),
    "bytes of bytes": ("normalizer", in_sequence("normalizers", [{"type": "ByteLevel"}] * 10)),
    "bytes of bytes, split": ("pre_tokenizer", in_sequence("pretokenizers", [BYTES] * 10)),
    "a long decoder": ("decoder", {"type": "WordPiece", "prefix": "#" * 5_000_000, "cleanup": True}),
    "a long pattern": ("pre_tokenizer", steps_of(["a|" * 1_000_000 + "b"])),
}


@pytest.mark.parametrize(("part", "step"), GROWS.values(), ids=GROWS)
def test_steps_that_multiply_a_prompt(t5, part, step):
    change(t5 / "tokenizer.json", lambda content: content.update({part: step}))
    with pytest.raises(CheckpointError, match="tokenizer.json was refused: .*(grow without end|is the most)"):
        t5_tokenizer(t5)


def test_steps_as_they_are_published(t5):
    ends = {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}
    published = {
        "normalizer": in_sequence("normalizers", [PREPEND, {"type": "NFKC"}]),
        "pre_tokenizer": in_sequence("pretokenizers", [steps_of([r"\s+"]), BYTES]),
        "post_processor": in_sequence("processors", [BYTES, template([WHOLE, END], [WHOLE, SECOND, END], ends)]),
        "decoder": BYTES,
    }
    checks.check_tokenizer(json.loads((t5 / "tokenizer.json").read_text()) | published, "x")

"""Prompts to ids, id for id as transformers' CLIPTokenizer and T5TokenizerFast have them from the same files."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tokenizers import CORPUS, T5_FORMS, write_trained_clip_tokenizer, write_trained_t5_tokenizer
from transformers import CLIPTokenizer, T5TokenizerFast

from mflux.errors import UsageError
from mflux.models.common.tokenizers.prompt_tokenizers import clip_tokenizer, t5_tokenizer
from mflux.text import plain

PROMPTS = [
    *CORPUS,
    "",
    " ",
    "   ",
    "\n",
    "A Photo OF a CAT",
    "naïve café Zürich été",
    "nai\u0308ve cafe\u0301 a\u0301\u0301\u0301",
    "İstanbul ẞ ß ſ Ǆ ΑΣ",
    "猫の写真と犬",
    "красная ПЛОЩАДЬ",
    "한국어 텍스트 \u1112\u1161\u11ab",
    "שלום مرحبا नमस्ते",
    "🐱🎨 emoji 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "hello   world\t\ttabs\nnewline\r\ncrlf\x0b\x0c",
    "  leading and trailing  ",
    "\x01\x07control\x1b[31m\x7f\x85",
    "\u200bzero\u200bwidth\u2060\ufeff\u00ad",
    "\u00a0nbsp\u3000ideographic\u2028line\u2029par\u0085nel\u1680ogham",
    "don't they'll I'm he's WE'VE YOU'D 's 't 're've o’clock",
    "1234567890 3.14 42nd ½ ① Ⅷ ٣",
    "ﬁ ligature ℌ 𝓗𝓮𝓵𝓵𝓸 ｆｕｌｌ",
    "<|endoftext|>",
    "a <|startoftext|> b<|endoftext|>c",
    "<|STARTOFTEXT|> <|ENDOFTEXT|> <|EndOfText|> <|end",
    "</s>",
    "a</s>b </s> c  </s>  d",
    "<pad> x <unk>y </S>",
    "<extra_id_0> z<extra_id_99><EXTRA_ID_5> <extra_id_100>",
    "▁under▁score _ __ a_b",
    "!!! a!b ?! ... --",
    "\ud7ff\ue000\uffff\U0010ffff",
    "word " * 200,
    "x" * 500,
    "猫" * 200,
]
LENGTHS = [3, 8, 77, 512]

LISTED = dict(single_word=False, lstrip=False, rstrip=False, special=True)
CLIP_FILES = {
    "plain": {},
    # As published with FLUX.1: a list with flags. Whether the tokens are looked for before or after lower-casing
    # differs between publications.
    **{
        f"listed, normalized {start} and {end}": {
            "added_tokens_decoder": {
                "733": LISTED | {"content": "<|startoftext|>", "normalized": start},
                "734": LISTED | {"content": "<|endoftext|>", "normalized": end},
            }
        }
        for start, end in itertools.product([True, False], repeat=2)
    },
    # As published with the first CLIP.
    "tables": {
        kind: LISTED | {"__type": "AddedToken", "content": f"<|{text}|>", "normalized": True}
        for kind, text in [("bos_token", "startoftext"), ("eos_token", "endoftext"), ("unk_token", "endoftext")]
    },
    # As published with some second CLIP encoders.
    "another padding": {"pad_token": "!"},
    "stripping": {
        "added_tokens_decoder": {
            "733": LISTED | {"content": "<|startoftext|>", "normalized": False, "lstrip": True, "rstrip": True},
            "734": LISTED | {"content": "<|endoftext|>", "normalized": False, "single_word": True},
        }
    },
}


def same_ids(ours, theirs, prompt: str, length: int) -> None:
    expected = theirs(plain(prompt), padding="max_length", max_length=length, truncation=True).input_ids
    assert ours.encode(prompt, max_length=length) == expected
    assert ours(prompt, max_length=length).tolist() == [expected]


@pytest.fixture(scope="module", params=list(CLIP_FILES))
def clip_pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    ids = write_trained_clip_tokenizer(folder, config=CLIP_FILES[request.param])
    assert ids["<|endoftext|>"] == 734, "the ids above are out of date"
    return clip_tokenizer(folder), CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=T5_FORMS)
def t5_pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    write_trained_t5_tokenizer(folder, form=request.param)
    return t5_tokenizer(folder), T5TokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_clip_ids(clip_pair, prompt):
    for length in LENGTHS:
        same_ids(*clip_pair, prompt, length)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_t5_ids(t5_pair, prompt):
    for length in LENGTHS:
        same_ids(*t5_pair, prompt, length)


fragments = st.sampled_from([*PROMPTS[:30], " ", "  ", "'s", "<|endoftext|>", "</s>", "▁", "\u3000", "!", "CAT"])
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40),
    st.lists(
        st.one_of(fragments, st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4)),
        max_size=6,
    ).map("".join),
)
many = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(text=texts, length=st.integers(3, 40))
def test_clip_ids_of_any_text(clip_pair, text, length):
    same_ids(*clip_pair, text, length)


@many
@given(text=texts, length=st.integers(3, 40))
def test_t5_ids_of_any_text(t5_pair, text, length):
    same_ids(*t5_pair, text, length)


@pytest.mark.parametrize("prompt", ["", "a cat", "word " * 200, "a photo of a cat on the mat"])
@pytest.mark.parametrize("length", [5, 9, 10, 77])
def test_a_prompt_is_called_cut_when_transformers_cuts_it(clip_pair, t5_pair, prompt, length):
    for ours, theirs in (clip_pair, t5_pair):
        assert ours.is_cut(prompt, max_length=length) == (len(theirs(prompt).input_ids) > length)


def test_special_tokens_from_the_older_file(tmp_path):
    """Before the list with flags there was a file of its own, which outdoes tokenizer_config.json."""
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=True)
    write_trained_clip_tokenizer(tmp_path, config={"pad_token": "a</w>"})
    table = {"eos_token": flags | {"content": "<|endoftext|>"}, "pad_token": "!", "unk_token": "<|startoftext|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(table))
    ours, theirs = clip_tokenizer(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    assert theirs.pad_token == "!"
    for prompt in PROMPTS:
        same_ids(ours, theirs, prompt, 30)


def test_t5_without_a_configuration_of_its_own(tmp_path):
    write_trained_t5_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    ours, theirs = t5_tokenizer(tmp_path), T5TokenizerFast.from_pretrained(tmp_path)
    for prompt in PROMPTS:
        same_ids(ours, theirs, prompt, 30)


@pytest.mark.parametrize(
    "read, write", [(clip_tokenizer, write_trained_clip_tokenizer), (t5_tokenizer, write_trained_t5_tokenizer)]
)
def test_a_prompt_in_another_encoding_is_refused(tmp_path, read, write):
    write(tmp_path)
    with pytest.raises(UsageError, match="not text in UTF-8"):
        read(tmp_path).encode("caf\udce9", max_length=10)


@pytest.mark.parametrize("kind", [*CLIP_FILES, *T5_FORMS])
def test_tokenizers_saved_by_transformers(tmp_path, kind):
    """transformers 5 writes tokenizer.json alone, for CLIP too, and rewrites the configuration."""
    published, saved = tmp_path / "published", tmp_path / "saved"
    if kind in CLIP_FILES:
        write_trained_clip_tokenizer(published, config=CLIP_FILES[kind])
        CLIPTokenizer.from_pretrained(published).save_pretrained(saved)
        ours, theirs = clip_tokenizer(saved), CLIPTokenizer.from_pretrained(saved)
    else:
        write_trained_t5_tokenizer(published, form=kind)
        T5TokenizerFast.from_pretrained(published).save_pretrained(saved)
        ours, theirs = t5_tokenizer(saved), T5TokenizerFast.from_pretrained(saved)
    assert (saved / "tokenizer.json").is_file() and not (saved / "vocab.json").exists()
    for prompt in PROMPTS:
        same_ids(ours, theirs, prompt, 30)

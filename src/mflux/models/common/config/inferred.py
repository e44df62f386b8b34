"""Which model the name of a folder or repository tells of, and whether it is another one's. Loads nothing heavy.

A name tells by its words. An alias of several words is told by all of them, in any order: `FLUX.1-Fill-dev-4bit` has
those of `dev-fill`. An alias of one word is too little in a name with words of its own: `HiDream-I1-Dev` is no
FLUX.1-dev. It has to stand beside words that say nothing, as in `my-dev-4bit`, or that belong to its family.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from mflux.models.common.registry import MODELS

_WORD = re.compile(r"[a-z0-9]+(?:\.[0-9]+)*")
# Spellings of one word.
_SAME = {"flux.1": "flux1", "flux.2": "flux2", "flux.3": "flux3", "f.1": "flux1", "fibo.2": "fibo2"}
# What makes of FLUX.1's one-word aliases, beside which other words may stand, those of FLUX.1.
_TELLING = {"flux", "flux1", "schnell"}
# Words that say nothing of which model it is: who keeps a copy, what was done to it, how it is stored.
_SAYING_NOTHING = """
a an and at by for from in of on the to with 1 bfl black flux flux1 forest labs bit bits bf16 bfloat16 f16 f32 fp16
fp32 fp8 full half int4 int8 nf4 quant quantized apple checkpoint checkpoints ckpt diffusers folder hf local mac
mflux mlx model models weights another backup cached copy custom default final first last latest mine mini my new
old original our own saved second small test tested tests thing tiny tmp wide best better fine finetune finetuned
fork ft lora loras merge merged mix mixed style styled train trained training tune tuned tuning
"""
_NUMBERED = re.compile(r"[vq]\d+(\.\d+)*|\d+bits?|lora\d+|\d{5,}")
# Words that are other models' own.
_OTHERS = """
auraflow bagel blip chatglm chroma chroma1 cogvideo cogvideox cogview cogview3 cogview4 deepseek deepfloyd
dreamshaper flex.1 flex.2 flux2 gemma glm gpt hidream hunyuan hunyuandit hunyuanimage hunyuanvideo illustrious
juggernaut kandinsky kolors llama ltx ltx2 ltxv lumina lumina2 mistral mochi omnigen omnigen2 pixart pony qwen1.5
qwen2 qwen2.5 qwen3 qwq sana sana1.5 sd sd1 sd1.5 sd2 sd2.1 sd3 sd3.5 sdxl sdxs seedream segmind skyreels smollm
smollm3 ssd stable step1x svd t5 unidiffuser wan wan2 wan2.1 wan2.2 wuerstchen zero123
"""
# Words that, behind a model's name, make it another's: what it takes or gives, or which part of a model it is.
_OTHER_USES = """
adapter animate animatediff asr audio blockwise canny caption chat clip coder controlnet detector edit editing
embedding encoder i2l i2v inpaint inpainting instruct ip ipadapter language layered math omni outpaint reranker
siglip speech t2v tagger thinking tokenizer transcribe tts upscale upscaler vae video vision vl vlm voice xl
"""
_NEUTRAL, _OF_OTHERS = frozenset(_SAYING_NOTHING.split()), frozenset(_OTHERS.split())
_OTHER_WORDS = _OF_OTHERS | frozenset(_OTHER_USES.split())
_MERGED = ("merge", "merged", "fused", "baked", "with", "mflux", "mlx", "diffusers")
_SIZE = re.compile(r"\d+(\.\d+)?b")


@dataclass(frozen=True)
class Told:
    """What a name tells.

    Attributes:
        key: the model, as a key of the registry, or None.
        other: where the name recalls `recalled` and is another model's: the word that says so.
        recalled: the registry's key that it recalls; None where it is known to be something else altogether.
    """

    key: str | None = None
    other: str | None = None
    recalled: str | None = None

    @property
    def is_known(self) -> bool:
        """Whether that word is another model's own."""
        return self.other in _OF_OTHERS


def told(name: str) -> Told:
    """What the last part of a path or repository tells. In Hugging Face's cache that is a commit; there it is the
    repository's name that counts."""
    if "://" in name:
        # What a browser shows of a repository, with a folder of it behind.
        name = re.sub(r"/(tree|blob|resolve)/.*$", "", name)
    parts = re.split(r"[/\\]", name.rstrip("/\\").lower())
    last = next((part.rpartition("--")[2] for part in parts if part.startswith("models--")), parts[-1])
    words = _words(last.partition("@")[0])
    rejected = Told(other=next((word for word in words if word in _OF_OTHERS), None))
    for alias, key in _aliases():
        if not set(alias) <= set(words):
            continue
        other = _other_s(words, alias, key)
        if other is None:
            return Told(key)
        if rejected.recalled is None:
            rejected = Told(other=other, recalled=key)
    return rejected


def is_lora(name: str) -> bool:
    """Whether a repository's name says that it is a LoRA, and not a model that one was merged into."""
    words = set(_words(name.rpartition("/")[2].partition("@")[0].lower()))
    return not words.isdisjoint(("lora", "loras")) and words.isdisjoint(_MERGED)


def _other_s(words: list[str], alias: tuple[str, ...], key: str) -> str | None:
    """The word of a name that says that it is not the model of the alias that stands in it, or None."""
    model = MODELS[key]
    own = _own_words(model) | set(alias)
    rest = [word for word in words if word not in own]
    siblings = _family_words(model["family"]) - own
    sizes = any(map(_SIZE.fullmatch, siblings | own))
    for word in rest:
        if word in _OTHER_WORDS or word in siblings or (sizes and _SIZE.fullmatch(word)):
            return word
    # A number behind it is another version: Z-Image-2.
    for before, word in pairwise(words):
        if before in alias and word in rest and re.fullmatch(r"\d{1,2}(\.\d+)*", word) and not _is_of_bits(words, word):
            return word
    if len(alias) > 1 or (model["family"] == "flux" and not _TELLING.isdisjoint(words)):
        return None
    return next((word for word in rest if not _says_nothing(words, word)), None)


def _says_nothing(words: list[str], word: str) -> bool:
    return word in _NEUTRAL or bool(_NUMBERED.fullmatch(word)) or _is_of_bits(words, word)


def _is_of_bits(words: list[str], word: str) -> bool:
    """Whether it is the number in `4-bit`."""
    return word.isdigit() and words[words.index(word) + 1 :][:1] in (["bit"], ["bits"])


def _words(text: str) -> list[str]:
    return [_SAME.get(word, word) for word in _WORD.findall(text)]


@cache
def _aliases() -> list[tuple[tuple[str, ...], str]]:
    """The words of every alias and repository, and the model's key: the most words first, then the longest, then the
    registry's order. A repository is told before the models that share it, which have other names."""
    found = []
    for order, (key, model) in enumerate(MODELS.items()):
        if key == "demo":
            continue
        names = list(model["aliases"])
        if "controlnet_model" not in model and "custom_transformer_model" not in model:
            names.append(model["model_name"].rpartition("/")[2].lower())
        for alias in names:
            words = tuple(_words(alias.lower()))
            found.append((-len(words), -len(alias), order, words, key))
    return [(words, key) for *_, words, key in sorted(found)]


def _own_words(model: dict[str, Any]) -> set[str]:
    names = [*model["aliases"], model["model_name"].rpartition("/")[2]]
    return {word for name in names for word in _words(name.lower())}


@cache
def _family_words(family: str) -> frozenset[str]:
    """The words of all its models, but for aliases of one word: where two of these stand, the longer one is meant."""
    models = [model for model in MODELS.values() if model["family"] == family and model["model_name"] != "demo"]
    alone = {words[0] for words, _ in _aliases() if len(words) == 1}
    return frozenset(word for model in models for word in _own_words(model)) - alone

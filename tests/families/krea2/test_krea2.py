"""Krea 2 without torch: er_sde, folders that mflux 0.24 fetched or saved, Turbo and Raw, and its command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from support.saved_024 import write_as_024
from support.tokenizers import write_json

from families.krea2.cases import LAYERS, write_tiny
from mflux.backend import mx, tree_flatten
from mflux.checkpoints.loading import FolderTensors
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.modulation import ModulationLinear
from mflux.models.common.schedulers import ErSdeScheduler
from mflux.models.krea2 import Krea2

SIZE = {"num_inference_steps": 2, "width": 48, "height": 32}
# Ours → theirs.
_BLOCK = (
    (r"\.attn\.to_q\.", ".attn.wq."), (r"\.attn\.to_k\.", ".attn.wk."), (r"\.attn\.to_v\.", ".attn.wv."),
    (r"\.attn\.to_out\.0\.", ".attn.wo."), (r"\.attn\.to_gate\.", ".attn.gate."), (r"\.ff\.", ".mlp."),
    (r"\.attn\.norm_([qk])\.weight", r".attn.qknorm.\1norm.scale"), (r"\.norm1\.weight", ".prenorm.scale"),
    (r"\.norm2\.weight", ".postnorm.scale"), (r"^final_layer\.norm\.weight", "last.norm.scale"),
    (r"^final_layer\.scale_shift_table", "last.modulation.lin"), (r"\.scale_shift_table", ".mod.lin"),
    (r"^final_layer\.", "last."), (r"^img_in\.", "first."), (r"^text_fusion\.", "txtfusion."),
    (r"^transformer_blocks\.", "blocks."), (r"^txt_in\.norm\.weight", "txtmlp.0.scale"),
)  # fmt: skip
AUTHORS = (
    (r"^time_embed\.linear_1\.", "tmlp.0."), (r"^time_embed\.linear_2\.", "tmlp.2."), (r"^time_mod_proj\.", "tproj.1."),
    (r"^txt_in\.linear_1\.", "txtmlp.1."), (r"^txt_in\.linear_2\.", "txtmlp.3."), *_BLOCK,
)  # fmt: skip
BY_024 = (
    (r"^time_embed\.linear_1\.", "tmlp.linear_in."), (r"^time_embed\.linear_2\.", "tmlp.linear_out."),
    (r"^time_mod_proj\.", "tproj.linear."), (r"^txt_in\.linear_1\.", "txtmlp.linear_in."),
    (r"^txt_in\.linear_2\.", "txtmlp.linear_out."), (r"^txt_in\.norm\.weight", "txtmlp.norm.scale"), *_BLOCK,
)  # fmt: skip
# The autoencoder keeps its published names here; tests of Qwen-Image have those of mflux 0.24.
NAMES_024 = {"transformer": BY_024, "text_encoder": ((r"^language_model\.", ""),), "vae": ()}
# What no shape of a saved folder tells is as published.
AS_PUBLISHED = {
    "transformer": {"num_text_layers": 12},
    "text_encoder": {
        "text_encoder_select_layers": [2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35],
        "text_config": {
            "model_type": "qwen3_vl_text", "vocab_size": 0, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 36, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
            "rope_theta": 5e6, "rope_scaling": {"mrope_section": [32, 0, 0], "rope_type": "default"},
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("krea2") / "model")


def krea2(folder: Path, name: str = "krea-2", **options) -> Krea2:
    return Krea2(model_path=str(folder), model_config=ModelConfig.from_name(name), **options)


def drawn(pipeline: Krea2, **settings) -> np.ndarray:
    settings = {"seed": 1, "prompt": "a red circle"} | SIZE | settings
    return np.asarray(pipeline.generate_image(**settings).image).astype(int)


# ---- er_sde


def schedule(steps: int, seed: int = 7) -> ErSdeScheduler:
    model = SimpleNamespace(
        requires_sigma_shift=False, sigma_shift=2.0, sigma_shift_terminal=None, sigma_base_shift=0.5,
        sigma_max_shift=1.15, sigma_base_seq_len=256, sigma_max_seq_len=6400,
    )  # fmt: skip
    return ErSdeScheduler(SimpleNamespace(num_inference_steps=steps, model_config=model, image_seq_len=256, seed=seed))


def weight(sigma):
    return sigma * (np.exp(sigma**0.3) + 10)


def by_hand(sigmas, latents, velocities, seed: int, *, order: int = 3, begin: int = 0) -> np.ndarray:
    """The same in double precision, term by term, from the formulas."""
    x, key, clean, slopes = latents.astype(np.float64), mx.random.key(seed ^ 0x5DE), {}, {}
    for i in range(begin, len(sigmas) - 1):
        s, t = sigmas[i], sigmas[i + 1]
        clean[i] = x - s * velocities[i]
        if t == 0:
            return clean[i]
        r = weight(t) / weight(s)
        y = r * x + (1 - r) * clean[i]
        points = t + np.arange(200) * (s - t) / 200
        if order >= 2 and i - 1 in clean:
            slopes[i] = (clean[i] - clean[i - 1]) / (s - sigmas[i - 1])
            first = (1 / weight(points)).sum() * (s - t) / 200
            y = y + (t - s + first * weight(t)) * slopes[i]
        if order >= 3 and i - 1 in slopes:
            bend = (slopes[i] - slopes[i - 1]) / ((s - sigmas[i - 2]) / 2)
            second = ((points - s) / weight(points)).sum() * (s - t) / 200
            y = y + ((t - s) ** 2 / 2 + second * weight(t)) * bend
        key, sub = mx.random.split(key)
        noise = np.array(mx.random.normal(x.shape, key=sub))
        x = y + noise * np.sqrt(max(t**2 - s**2 * r**2, 0))
    raise AssertionError("the last noise level is 0")


@pytest.mark.parametrize(("steps", "begin"), [(1, 0), (2, 0), (3, 0), (6, 0), (6, 2)])
def test_er_sde(steps, begin):
    random = np.random.default_rng(steps)
    latents = random.standard_normal((1, 16, 4, 6)).astype(np.float32)
    velocities = random.standard_normal((steps, 1, 16, 4, 6)).astype(np.float32)
    scheduler = schedule(steps)
    sigmas = np.array(scheduler.sigmas).astype(np.float64)
    x = mx.array(latents)
    for number in range(begin, steps):
        x = scheduler.step(noise=mx.array(velocities[number]), timestep=number, latents=x)
    expected = by_hand(sigmas, latents, velocities, 7, begin=begin)
    assert np.linalg.norm(np.array(x) - expected) <= 1e-4 * np.linalg.norm(expected)
    # Each order says something of its own, from the step on in which it has what it needs.
    for order in (1, 2):
        other = by_hand(sigmas, latents, velocities, 7, order=order, begin=begin)
        is_seen = steps - begin > order + 1
        assert bool(np.linalg.norm(other - expected) > 1e-3 * np.linalg.norm(expected)) is is_seen
    if steps - begin > 1:
        other = by_hand(sigmas, latents, velocities, 8, begin=begin)
        assert np.linalg.norm(other - expected) > 0.01 * np.linalg.norm(expected)


def test_er_sde_on_request(model):
    pipeline = krea2(model)
    plain, sde = drawn(pipeline, num_inference_steps=4), drawn(pipeline, num_inference_steps=4, scheduler="er_sde")
    assert not np.array_equal(plain, sde)
    assert np.array_equal(drawn(pipeline, num_inference_steps=4, scheduler="er_sde"), sde)
    assert np.array_equal(drawn(pipeline, num_inference_steps=4, scheduler="euler"), plain)
    # It is mflux 0.24's in its shift as well, which follows from the size.
    config = pipeline.settings(seed=1, prompt="", num_inference_steps=4, width=256, height=256, scheduler="er_sde")
    raw = krea2(model, "krea-2-raw")
    raw.model_config.sigma_base_shift, raw.model_config.sigma_max_shift = 0.5, 1.15
    other = raw.settings(seed=1, prompt="", num_inference_steps=4, width=256, height=256)
    assert mx.array_equal(config.scheduler.sigmas, other.scheduler.sigmas)


# ---- Turbo and Raw


def with_index(source: Path, target: Path, **index) -> Path:
    shutil.copytree(source, target)
    content = {"_class_name": "Krea2Pipeline", "text_encoder_select_layers": LAYERS} | index
    write_json(target / "model_index.json", content)
    return target


@pytest.mark.parametrize(
    ("index", "name", "distilled"),
    [
        ({"is_distilled": True}, "krea-2-raw", True),
        ({"is_distilled": False}, "krea-2", False),
        ({}, "krea-2", True),
        ({}, "krea-2-raw", False),
        ({}, "krea-2-controlnet-depth", True),
    ],
)
def test_which_is_distilled(model, tmp_path, index, name, distilled):
    pipeline = krea2(with_index(model, tmp_path / "model", **index), name)
    assert pipeline.is_distilled is distilled
    assert (pipeline.model_config.sigma_base_shift == 1.15) is distilled


def test_other_patches_are_refused(model, tmp_path):
    from mflux.errors import CheckpointError

    with pytest.raises(CheckpointError, match="patches of 4"):
        krea2(with_index(model, tmp_path / "model", patch_size=4))


def authors_file(source: Path, file: Path) -> Path:
    import re

    tensors = {}
    for name, value in FolderTensors(source / "transformer").items():
        for pattern, new in AUTHORS:
            name = re.sub(pattern, new, name)
        tensors[name] = value.reshape(-1) if name.endswith(".mod.lin") else value
    mx.save_safetensors(str(file), tensors)
    return file


@pytest.mark.parametrize(("file", "distilled"), [("turbo.safetensors", True), ("raw.safetensors", False)])
def test_what_mflux_024_fetched(tmp_path, file, distilled):
    """A single file at the root, and neither the published transformer nor the settings of the whole."""
    source = write_tiny(tmp_path / "source", changes=published_text())
    folder = tmp_path / "fetched"
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(source / part, folder / part)
    authors_file(source, folder / file)
    fetched = krea2(folder)
    whole = krea2(
        with_index(source, tmp_path / "whole", is_distilled=distilled, text_encoder_select_layers=published())
    )
    assert fetched.is_distilled is distilled
    assert np.array_equal(drawn(fetched), drawn(whole))
    fetched.save_model(str(tmp_path / "saved"))
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["is_distilled"] is distilled and index["_class_name"] == "Krea2Pipeline"
    assert np.array_equal(drawn(krea2(tmp_path / "saved")), drawn(whole))


@pytest.mark.parametrize(
    ("there", "parts", "more"),
    [
        (("turbo.safetensors",), ["text_encoder", "vae"], ("turbo.safetensors",)),
        (("turbo.safetensors", "transformer/config.json"), ["text_encoder", "transformer", "vae"], ()),
        ((), ["text_encoder", "transformer", "vae"], ()),
    ],
)
def test_what_mflux_024_fetched_is_not_fetched_again(model, tmp_path, monkeypatch, there, parts, more):
    for name in there:
        (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / name).touch()
    asked = []
    monkeypatch.setattr("mflux.models.krea2.pipeline.cached_copy", lambda name: tmp_path / "cache")
    monkeypatch.setattr("mflux.models.krea2.pipeline.resolve", lambda *args: asked.append(args) or model)
    Krea2(model_config=ModelConfig.krea2())
    ((name, components, beside),) = asked
    assert name == "krea/Krea-2-Turbo" and [component.name for component in components] == parts
    assert beside == ("model_index.json", "scheduler", "tokenizer", *more)


def published() -> list[int]:
    return AS_PUBLISHED["text_encoder"]["text_encoder_select_layers"]


def published_text() -> dict:
    from support.tokenizers import QWEN3_SPECIAL, spelled
    from tokenizers import pre_tokenizers

    vocabulary = len({*pre_tokenizers.ByteLevel.alphabet(), *("".join(pair) for pair in spelled()), *QWEN3_SPECIAL})
    text = AS_PUBLISHED["text_encoder"]["text_config"] | {"vocab_size": vocabulary}
    return {
        "transformer": {"num_text_layers": 12, "text_hidden_dim": 64},
        "text_encoder": AS_PUBLISHED["text_encoder"] | {"text_config": text},
    }


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_folder_of_mflux_024(tmp_path, bits, monkeypatch):
    # 0.24 packed what modulates as well, and no text encoder.
    monkeypatch.setattr(ModulationLinear, "read_late", False)
    source = write_tiny(tmp_path / "source", wide=True, changes=published_text())
    source = with_index(source, tmp_path / "indexed", is_distilled=True, text_encoder_select_layers=published())
    old = tmp_path / "old"
    names = {part: names for part, names in NAMES_024.items() if part != "text_encoder"}
    # 0.24 writes tables in rows, and packs none.
    path = next((source / "transformer").glob("*.safetensors"))
    rows = shutil.copytree(source, tmp_path / "rows") / "transformer" / path.name
    flat = {name: value.reshape(-1) if "_table" in name else value for name, value in mx.load(str(path)).items()}
    mx.save_safetensors(str(rows), flat)
    write_as_024(tmp_path / "rows", old, names, bits=bits)
    write_as_024(source, tmp_path / "text", {"text_encoder": NAMES_024["text_encoder"]})
    shutil.move(tmp_path / "text" / "text_encoder", old / "text_encoder")
    # The transformer's files lie at the root.
    for path in (old / "transformer").iterdir():
        shutil.move(path, old / path.name)
    (old / "transformer").rmdir()
    fresh, stored = krea2(source, quantize=bits), krea2(old)
    assert stored.bits == bits and stored.is_distilled
    for part in ("text_encoder", "transformer", "vae"):
        one, other = (dict(tree_flatten(getattr(each, part).parameters())) for each in (fresh, stored))
        assert one.keys() == other.keys(), part
        for name, value in one.items():
            assert mx.array_equal(value, other[name]), (part, name)
    assert np.array_equal(drawn(fresh), drawn(stored))
    stored.save_model(str(tmp_path / "new"))
    assert np.array_equal(drawn(krea2(tmp_path / "new")), drawn(fresh))


def test_what_mflux_024_gave_for_a_seed():
    from mflux.models.krea2.latent_creator import Krea2LatentCreator

    noise = Krea2LatentCreator.create_noise(7, 96, 48)
    assert mx.array_equal(noise, mx.random.normal((1, 16, 12, 6), key=mx.random.key(7)))


def test_guidance_counts_from_one(model):
    pipeline = krea2(model)
    plain = drawn(pipeline)
    assert np.array_equal(drawn(pipeline, guidance=1.0, negative_prompt="a dog"), plain)
    guided = drawn(pipeline, guidance=3.5)
    assert not np.array_equal(guided, plain)
    assert not np.array_equal(drawn(pipeline, guidance=3.5, negative_prompt="a dog"), guided)
    assert not np.array_equal(drawn(pipeline, guidance=3.5, negative_prompt=" "), guided)


# ---- the command


def settings_of(path: Path) -> dict:
    return json.loads(path.with_suffix(".metadata.json").read_text())


WORDS = ("--prompt", "a cat", "--seed", 1, "--width", 32, "--height", 32, "--metadata")


@pytest.mark.parametrize(("base", "steps", "guidance"), [("krea-2", 8, 1.0), ("krea-2-raw", 52, 4.5)])
def test_each_model_has_its_own_steps_and_guidance(cli, in_folder, model, base, steps, guidance):
    plan = command().plan({"model": str(model), "base_model": base, "prompt": "a cat"})
    assert (plan.images[0]["num_inference_steps"], plan.images[0]["guidance"]) == (steps, guidance)
    typed = {"model": str(model), "base_model": base, "prompt": "a cat", "steps": 5, "guidance": 2.0}
    plan = command().plan(typed)
    assert (plan.images[0]["num_inference_steps"], plan.images[0]["guidance"]) == (5, 2.0)


def command():
    from mflux.models.krea2.cli.krea2_generate import COMMAND

    return COMMAND


def test_an_image_of_mflux_024_is_made_with_the_sampler_it_had(cli, in_folder, model):
    words = ("--model", model, "--base-model", "krea-2", "--steps", 4)
    plain = cli("generate-krea2", *words, *WORDS)
    sde = cli("generate-krea2", *words, *WORDS, "--scheduler", "er_sde", "--output", "sde.png")
    assert (plain.status, sde.status) == (0, 0), plain.err + sde.err
    assert settings_of(sde.paths[0])["scheduler"] == "er_sde"
    old = settings_of(plain.paths[0]) | {"mflux_version": "0.24.0"}
    Path("old.json").write_text(json.dumps(old))
    again = cli("generate-krea2", *words[:4], "-C", "old.json", "--output", "again.png")
    assert again.status == 0, again.err
    first, second = (np.asarray(PIL.Image.open(path)) for path in (sde.paths[0], again.paths[0]))
    assert np.array_equal(first, second)


def test_raw_is_generated_by_command(cli, in_folder, model, tmp_path):
    folder = with_index(model, tmp_path / "Krea-2-Raw", is_distilled=False)
    result = cli("generate-krea2", "--model", folder, *WORDS, "--steps", 2, "--negative-prompt", "a dog")
    assert result.status == 0 and not result.warnings, result.err
    assert settings_of(result.paths[0])["guidance"] == 4.5


def test_pid_is_refused(cli, in_folder, model):
    result = cli("generate-krea2", "--model", model, "--base-model", "krea-2", *WORDS, "--pid-decode")
    assert result.status in (1, 2) and "PiD" in result.err and "not built" in result.err

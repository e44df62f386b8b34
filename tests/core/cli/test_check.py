"""`mflux-check model`: what loading would complain of, without loading, and what is broken in Hugging Face's cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
from support.tiny import published, write_json
from support.tiny_models import EVERY_TINY

from mflux.backend import mx
from mflux.cli.capabilities import describe
from mflux.models.common.checking import check_model
from mflux.models.common.controls.depth_pro.network import DepthProConfig, DepthProForDepthEstimation
from mflux.models.common.family import families
from mflux.models.common.model import layout_of
from mflux.models.common.networks.qwen3_vl import Qwen3VLConfig, Qwen3VLForConditionalGeneration


@pytest.fixture(autouse=True)
def nothing_is_sent(monkeypatch):
    """A model is checked without asking the network for anything."""

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def lines(result, label: str) -> list[str]:
    return [line.removeprefix(f"{label}: ") for line in result.out.splitlines() if line.startswith(f"{label}: ")]


# ---- every family


@EVERY_TINY
def test_a_whole_model_passes_and_nothing_of_it_is_read(cli, tiny, monkeypatch):
    root = tiny.folder()
    monkeypatch.setattr("mflux.backend.mx.eval", lambda *_: pytest.fail("numbers were read"))
    result = cli("check", "model", root, "--base-model", tiny.case.base_model)
    assert (result.status, result.err) == (0, "")
    assert lines(result, "check") == ["pass"]
    assert lines(result, "problem") == lines(result, "broken") == []
    assert lines(result, "format") == ["safetensors"]


@EVERY_TINY
def test_what_mflux_saved_passes_and_tells_its_model_itself(cli, tiny):
    result = cli("check", "model", tiny.save("-q", 8))
    assert (result.status, lines(result, "check"), lines(result, "format")) == (0, ["pass"], ["mflux"]), result.out


@EVERY_TINY
def test_each_component_is_compared_with_its_tensors(cli, tiny, in_folder):
    """One tensor missing in each component, one too many, one of another shape: all are told at once."""
    root = copy(tiny.folder(), in_folder / "x")
    expected = []
    for file in sorted(root.glob("*/*.safetensors")):
        tensors = mx.load(str(file))
        gone = next(key for key, value in sorted(tensors.items()) if value.ndim > 1)
        del tensors[gone]
        tensors["one.too.many"] = mx.zeros(3)
        mx.save_safetensors(str(file), tensors)
        expected.append(file.parent.name)
    result = cli("check", "model", root, "--base-model", tiny.case.base_model)
    assert (result.status, lines(result, "check")) == (1, ["fail"])
    problems = lines(result, "problem")
    for part in expected:
        (told,) = [problem for problem in problems if problem.startswith(f"{root / part} does not fit")]
        assert "1 tensor missing" in told and re.search(r"1 tensor left over \(([\w.]+\.)?one\.too\.many\)", told)


@EVERY_TINY
def test_what_check_says_is_what_loading_says(cli, tiny, in_folder):
    root = copy(tiny.folder(), in_folder / "x")
    file = next((root / "transformer").glob("*.safetensors"))
    tensors = mx.load(str(file))
    key = next(key for key, value in sorted(tensors.items()) if value.ndim == 2)
    tensors[key] = tensors[key][:, :-1]
    mx.save_safetensors(str(file), tensors)
    problems = lines(cli("check", "model", root, "--base-model", tiny.case.base_model), "problem")
    drawn = tiny.run("--prompt", tiny.case.prompt, "--steps", 1, "--width", 32, "--height", 32, model=root)
    assert drawn.status == 1
    assert drawn.errors == [f"error: {problem}" for problem in problems]
    assert f"{key} has the shape" in problems[0]


@EVERY_TINY
def test_missing_and_damaged_files(cli, tiny, in_folder):
    parts = [path.parent.name for path in sorted(tiny.folder().glob("*/config.json"))]
    for number, part in enumerate(parts):
        root = copy(tiny.folder(), in_folder / f"a{number}")
        (root / part / "config.json").unlink()
        result = cli("check", "model", root, "--base-model", tiny.case.base_model)
        if part in layout_of(tiny.case.pipeline_class().family).config_optional:
            assert result.status == 0, "its shapes tell what a configuration would say"
            continue
        assert result.status == 1
        assert any(str(root / part) in problem for problem in lines(result, "problem"))
        root = copy(tiny.folder(), in_folder / f"b{number}")
        file = next((root / part).glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1])
        result = cli("check", "model", root, "--base-model", tiny.case.base_model)
        assert [problem for problem in lines(result, "problem") if f"{file} is truncated" in problem]
        file.unlink()
        result = cli("check", "model", root, "--base-model", tiny.case.base_model)
        assert any(f"{root / part} holds no weights" in problem for problem in lines(result, "problem"))


def test_every_family_can_be_checked():
    for name, family in families().items():
        assert family.components or family.single, name


# ---- families that are one model

_VIT = {
    "model_type": "dinov2", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 16,
    "patch_size": 4, "mlp_ratio": 2, "use_mask_token": False,
}  # fmt: skip
ALONE = {
    "Depth Pro": (
        DepthProForDepthEstimation,
        DepthProConfig,
        {
            "model_type": "depth_pro", "patch_size": 16, "fusion_hidden_size": 8, "intermediate_hook_ids": [1, 0],
            "intermediate_feature_dims": [8, 8], "scaled_images_feature_dims": [12, 10, 6], "use_fov_model": True,
            "patch_model_config": _VIT, "image_model_config": _VIT, "fov_model_config": _VIT,
        },
    ),
    "FIBO-VLM": (
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig,
        {
            "model_type": "qwen3_vl", "image_token_id": 5, "tie_word_embeddings": False,
            "text_config": {
                "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
            },
            "vision_config": {
                "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
                "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "patch_size": 4,
            },
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("title", ALONE)
def test_a_family_that_is_one_model(cli, in_folder, title):
    module_class, config_class, settings = ALONE[title]
    tensors = published(module_class(config_class.from_dict(settings)), seed=1)
    write_json(in_folder / "config.json", settings)
    mx.save_safetensors("model.safetensors", tensors)
    result = cli("check", "model", in_folder)
    assert (result.status, lines(result, "model")) == (0, [title]), result.out
    gone = min(tensors)
    del tensors[gone]
    mx.save_safetensors("model.safetensors", tensors)
    result = cli("check", "model", in_folder)
    assert (result.status, lines(result, "model")) == (1, [title])
    (problem,) = lines(result, "problem")
    assert f"1 tensor missing ({gone})" in problem
    (in_folder / "config.json").write_text("{")
    assert cli("check", "model", in_folder).status == 1


def test_a_single_file(cli, in_folder):
    mx.save_safetensors("x.safetensors", {"a": mx.ones(4)})
    result = cli("check", "model", "x.safetensors")
    assert (result.status, lines(result, "check"), lines(result, "format")) == (0, ["pass"], ["safetensors"])
    path = in_folder / "x.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = cli("check", "model", "x.safetensors")
    assert result.status == 1 and "is truncated" in lines(result, "problem")[0]


def test_a_folder_whose_kind_nobody_knows(cli, in_folder):
    """As in mflux 0.24, its files are looked at."""
    mx.save_safetensors("a.safetensors", {"x": mx.ones(4)})
    mx.save_safetensors("b.safetensors", {"y": mx.ones(4)})
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    write_json(in_folder / "model.safetensors.index.json", index)
    result = cli("check", "model", in_folder)
    assert (result.status, lines(result, "model"), lines(result, "size")) == (0, [], ["198 B"]), result.out
    index["weight_map"]["z"] = "b.safetensors"
    write_json(in_folder / "model.safetensors.index.json", index)
    (problem,) = lines(cli("check", "model", in_folder), "problem")
    assert "names tensors that its shards do not hold (z)" in problem
    (in_folder / "a.safetensors").unlink()
    (problem,) = lines(cli("check", "model", in_folder), "problem")
    assert "1 of 2 weight files are missing, such as a.safetensors" in problem
    for path in in_folder.iterdir():
        path.unlink()
    result = cli("check", "model", in_folder)
    assert result.status == 1 and "holds no weights" in lines(result, "problem")[0]


def test_the_transformer_tells_the_family_where_nothing_else_does(cli, in_folder, tiny_dev):
    root = copy(tiny_dev, in_folder / "a model")
    result = cli("check", "model", root)
    assert (result.status, lines(result, "model")) == (0, ["FLUX.1"]), result.out


def test_the_demo(cli):
    result = cli("check", "model", "demo")
    assert (result.status, lines(result, "model")) == (0, ["demo"]), result.out


def test_what_is_no_model(cli, in_folder):
    for name, told in (
        ("schnel", "there is no folder schnel here"),
        ("./x", "there is no folder"),
        ("a/b/c", "there is no folder"),
        ("org/name", "org/name is not in the cache, and a check sends nothing"),
        ("x" * 300, ""),
        ("a\0b", "NUL"),
    ):
        result = cli("check", "model", name)
        assert result.status in (1, 2) and len(result.errors) == 1 and told in result.errors[0], result.err
        assert result.out == ""
    assert cli("check").status == cli("check", "model").status == cli("check", "other", "x").status == 2
    (in_folder / "x").mkdir()
    result = cli("check", "model", "x", "--base-model", "nothing")
    assert result.status == 2 and "the base model 'nothing' is not known" in result.errors[0]


def test_the_command_is_declared_as_mflux_024_has_it():
    (command, *_) = [option for option in describe("check")["options"] if option["flag"] == "command"]
    assert command["choices"] == ["model"] and command["required"] and command["nargs"] == "A..."


# ---- Hugging Face's cache


@pytest.fixture
def cached(tmp_path, monkeypatch, tiny_schnell):
    """The tiny model as Hugging Face's cache holds it, as org/schnell; returns its folder there."""
    holder = tmp_path / "hub" / "models--org--schnell"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(holder.parent))
    store(
        holder,
        "c" * 40,
        {
            path.relative_to(tiny_schnell).as_posix(): path.read_bytes()
            for path in tiny_schnell.rglob("*")
            if path.is_file()
        },
    )
    (holder / "refs").mkdir()
    (holder / "refs" / "main").write_text("c" * 40)
    return holder


def store(holder: Path, commit: str, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        identity = (
            hashlib.sha256(content)
            if name.endswith(".safetensors")
            else hashlib.sha1(b"blob %d\0" % len(content) + content)
        )
        blob = holder / "blobs" / identity.hexdigest()
        link = holder / "snapshots" / commit / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))


def snapshot(holder: Path) -> Path:
    return holder / "snapshots" / ("c" * 40)


VAE = "vae/diffusion_pytorch_model.safetensors"


def everything(folder: Path) -> dict[str, bytes | str]:
    return {
        path.relative_to(folder).as_posix(): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def test_a_whole_copy_passes(cli, cached):
    before = everything(cached.parent)
    for words in ((), ("--fix",), ("--repair",)):
        result = cli("check", "model", *words, "org/schnell")
        assert (result.status, lines(result, "check"), result.err) == (0, ["pass"], ""), result.out
        assert lines(result, "root") == [str(snapshot(cached))]
        assert lines(result, "fixed") == []
    assert everything(cached.parent) == before


def shorten(path: Path) -> None:
    blob = path.resolve()
    blob.write_bytes(blob.read_bytes()[:-10])


def other_bytes(path: Path) -> None:
    blob = path.resolve()
    blob.write_bytes(blob.read_bytes().replace(b"4", b"5", 1))


def announced(path: Path) -> None:
    """A file longer than the Hub said."""
    holder = path.parents[3]
    write_json(holder / "trees" / f"{path.parents[1].name}.json", {"files": {VAE: {"size": 5, "lfs_size": 7}}})


FAULTS = {
    "a link to nothing": (VAE, lambda path: path.resolve().unlink(), "is a link to nothing"),
    "a short blob": (VAE, shorten, "is truncated"),
    "a web page": (VAE, lambda path: path.resolve().write_bytes(b"<html>"), "is a web page"),
    "an empty configuration": ("vae/config.json", lambda path: path.resolve().write_bytes(b""), "other bytes"),
    "a changed configuration": ("vae/config.json", other_bytes, "holds other bytes than its git id says"),
    "another length": (VAE, announced, "where 7 were announced"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_entry_is_told_and_removed_on_demand(cli, cached, name):
    file, spoil, told = FAULTS[name]
    path = snapshot(cached) / file
    blob = path.resolve()
    spoil(path)
    before = everything(cached.parent)
    result = cli("check", "model", "org/schnell")
    assert (result.status, lines(result, "check")) == (1, ["fail"])
    (broken,) = lines(result, "broken")
    assert broken.startswith(f"{path} ") and told in broken
    assert lines(result, "fix") == ["mflux-check --fix org/schnell"]
    assert everything(cached.parent) == before, "a check changes nothing"
    result = cli("check", "model", "--fix", "org/schnell")
    assert result.status == 1, "it has to be fetched again"
    gone = [blob] * (name != "a link to nothing") + [path]
    assert lines(result, "fixed") == [f"removed {entry}" for entry in gone]
    assert everything(cached.parent).keys() == before.keys() - {
        one.relative_to(cached.parent).as_posix() for one in gone
    }
    assert lines(result, "broken") == []


def test_leftovers_do_not_keep_a_model_from_drawing(cli, cached):
    left = cached / "blobs" / ("a" * 64 + ".12345678.incomplete")
    left.write_bytes(bytes(5000))
    result = cli("check", "model", "org/schnell")
    assert (result.status, lines(result, "check")) == (0, ["pass"])
    assert lines(result, "leftover") == [f"{left} is what a download left that broke off (5 kB)"]
    result = cli("check", "model", "org/schnell", "--fix")
    assert (result.status, lines(result, "fixed")) == (0, [f"removed {left}"])
    assert not left.exists()


def test_a_download_that_runs_is_left_alone(cli, cached):
    left = cached / "blobs" / ("a" * 64 + ".incomplete")
    left.write_bytes(bytes(5000))
    lock = cached.parent / ".locks" / cached.name / ("a" * 64 + ".lock")
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = cli("check", "model", "--fix", "org/schnell")
        assert (result.status, lines(result, "leftover"), lines(result, "fixed")) == (0, [], [])
        assert left.exists()


def test_a_reference_to_nothing(cli, cached):
    (cached / "refs" / "main").write_text("d" * 40)
    result = cli("check", "model", "org/schnell")
    assert result.status == 1 and "names a snapshot that is not there" in lines(result, "broken")[0]
    result = cli("check", "model", "--fix", "org/schnell")
    assert lines(result, "fixed") == [f"removed {cached / 'refs' / 'main'}"]
    assert snapshot(cached).is_dir()


def test_a_blob_is_brought_back_from_another_snapshot(cli, cached):
    """As mflux 0.24 does it: the sum in the link's name proves that it is the same file."""
    path = snapshot(cached) / VAE
    blob = path.resolve()
    content = blob.read_bytes()
    other = cached / "snapshots" / ("d" * 40) / VAE
    other.parent.mkdir(parents=True)
    blob.unlink()
    other.write_bytes(content[:-1] + b"x")
    result = cli("check", "model", "--fix", "org/schnell")
    assert (result.status, lines(result, "fixed")) == (1, [f"removed {path}"]), "another file of that name is not taken"
    path.symlink_to(os.path.relpath(blob, path.parent))
    other.write_bytes(content)
    result = cli("check", "model", "--fix", "org/schnell")
    assert (result.status, lines(result, "fixed")) == (0, [f"brought back {path} from {other}"]), result.out
    assert blob.read_bytes() == content


def test_nothing_outside_the_cache_is_touched(cli, cached, tmp_path, tiny_schnell):
    """Neither a folder of one's own, nor what links in the cache lead to."""
    own = copy(tiny_schnell, tmp_path / "own-schnell")
    shorten(own / VAE)
    (own / "vae" / "x.incomplete").write_bytes(b"mine")
    (own / "vae" / "nothing.json").symlink_to("nowhere")
    before = everything(own)
    result = cli("check", "model", "--fix", own)
    assert result.status == 1 and everything(own) == before
    assert lines(result, "fixed") == [
        "nothing, since only Hugging Face's cache is changed and this is a folder of your own"
    ]
    # A file outside that a link in the cache leads to, and a folder.
    link = snapshot(cached) / VAE
    link.unlink()
    link.symlink_to(own / VAE)
    (snapshot(cached) / "more").symlink_to(own)
    result = cli("check", "model", "--fix", "org/schnell")
    assert lines(result, "fixed") == [f"removed {link}"]
    assert everything(own) == before


def test_a_repository_that_is_a_link_is_told_as_one(cli, cached, tmp_path):
    cached.rename(tmp_path / "elsewhere")
    cached.symlink_to(tmp_path / "elsewhere")
    for reference in ("org/schnell", cached):
        result = cli("check", "model", "--fix", reference)
        assert lines(result, "fixed") == [
            f"nothing, since only Hugging Face's cache is changed and {cached} is a link to another place"
        ], result.out


def test_blobs_that_are_a_link_are_not_followed(cli, cached, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (cached / "blobs").rename(elsewhere)
    (cached / "blobs").symlink_to(elsewhere)
    (elsewhere / "x.incomplete").write_bytes(b"mine")
    shorten(snapshot(cached) / VAE)
    before = everything(elsewhere)
    result = cli("check", "model", "--fix", "org/schnell")
    assert everything(elsewhere) == before
    assert lines(result, "fixed") == [f"removed {snapshot(cached) / VAE}"]


def test_a_component_that_is_not_in_the_cache_is_missing(cli, cached):
    shutil.rmtree(snapshot(cached) / "vae")
    result = cli("check", "model", "org/schnell")
    (problem,) = lines(result, "problem")
    assert result.status == 1 and problem.startswith(f"{snapshot(cached) / 'vae' / 'config.json'} is missing")


def test_nothing_a_file_says_reaches_the_terminal_as_it_is(cli, in_folder):
    mx.save_safetensors("a.safetensors", {"x": mx.ones(4)})
    write_json(in_folder / "model.safetensors.index.json", {"weight_map": {"\x1b[2J" + "y" * 5000: "a.safetensors"}})
    result = cli("check", "model", in_folder)
    assert result.status == 1 and all(line.isprintable() and len(line) < 3000 for line in result.out.splitlines())


def test_python(tiny_dev):
    report = check_model(str(tiny_dev), "dev")
    assert report.passed and report.model == "dev" and report.root == tiny_dev and report.holder is None


@pytest.mark.parametrize(
    "words",
    [["demo"], ["model", "demo"], ["--fix", "demo"], ["--base-model", "demo", "demo"], ["demo", "--base-model", "demo"],
     ["-v", "demo"], ["-v", "model", "demo"], ["model", "--fix", "demo"]],
    ids=" ".join,
)  # fmt: skip
def test_a_model_is_checked_with_and_without_the_word(cli, words):
    result = cli("check", *words)
    assert (result.status, result.out.splitlines()[:2]) == (0, ["check: pass", "model: demo"])


@pytest.mark.parametrize("words", [[], ["--nonsense"], ["model"]])
def test_no_model_to_check(cli, words):
    result = cli("check", *words)
    assert result.status == 2 and len(result.errors) == 1

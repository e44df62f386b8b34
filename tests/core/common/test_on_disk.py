"""What exists on disk is never "not known": each kind of file and folder is called what it is, whatever it is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mflux.backend import mx

LORA = "name it with --lora"
MODEL = "give a folder of a model in the diffusers layout"


def tensors(*names: str) -> Callable[[Path], None]:
    return lambda path: mx.save_safetensors(str(path), {name: mx.zeros((2, 2)) for name in names})


def content(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def picture(kind: str) -> Callable[[Path], None]:
    return lambda path: Image.new("RGB", (8, 8)).save(path, kind)


FILES = {
    "png": (picture("PNG"), "is a picture (PNG), no model: a picture to start from is said with --image"),
    "jpeg": (picture("JPEG"), "is a picture (JPEG), no model"),
    "webp": (picture("WEBP"), "is a picture (WebP), no model"),
    "gguf": (content(b"GGUF\3\0\0\0" + bytes(64)), "holds no tensors: fetch it again"),
    "text": (content(b"a red circle\n"), f"is a text file, no model: {MODEL}"),
    "pdf": (content(b"%PDF-1.7"), "is a PDF"),
    "empty": (content(b""), "is empty: fetch it again"),
    "lfs": (content(b"version https://git-lfs.github.com/spec/v1\n"), "is a pointer of Git LFS"),
    "page": (content(b"<!DOCTYPE html><html>"), "is a web page"),
    "pytorch": (content(b"PK\3\4" + bytes(60)), "is truncated: it is an archive without its directory"),
    "bytes": (content(bytes(range(1, 200))), "is no file of weights that is known"),
    "lora": (tensors("transformer.a.lora_A.weight", "transformer.a.lora_B.weight"), f"is a LoRA, no model: {LORA}"),
    "kohya": (tensors("lora_unet_a.lora_down.weight", "lora_unet_a.alpha"), f"is a LoRA, no model: {LORA}"),
    "loha": (tensors("lora_unet_a.hada_w1_a", "lora_unet_a.alpha"), f"is a LoHa, no model: {LORA}"),
    "lokr": (tensors("lycoris_a.lokr_w1", "lycoris_a.lokr_w2_a"), f"is a LoKr, no model: {LORA}"),
    "oft": (tensors("lora_unet_a.oft_blocks"), f"is an OFT, no model: {LORA}"),
    "strange": (tensors("a", "b.c"), "holds 2 tensors, whose names (a, b.c) belong to no model that is built"),
}


@pytest.mark.parametrize("name", ["thing", "my-dev.safetensors", "FLUX.2-dev"])
@pytest.mark.parametrize("kind", FILES)
def test_a_file(kind, name, cli, in_folder):
    write, told = FILES[kind]
    write(in_folder / name)
    if not (in_folder / name).exists():
        # MLX adds the ending.
        (in_folder / f"{name}.safetensors").rename(in_folder / name)
    result = cli("generate", "--model", f"./{name}", "--prompt", "x")
    assert result.status in (1, 2) and len(result.errors) == 1
    if name == "my-dev.safetensors" and kind in ("strange", "empty", "lfs", "page", "oft"):
        # It was asked for as FLUX.1's transformer.
        assert name in result.errors[0]
    else:
        assert f"error: {name} {told}" in result.errors[0]


def configured(folder: Path, part: str, kind: str) -> None:
    (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / part / ("model_index.json" if not part else "config.json")).write_text(json.dumps({"_class_name": kind}))


def alone(name: str, write: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: write(folder / name)


FOLDERS = {
    "empty": (lambda folder: None, f"is an empty folder: {MODEL}"),
    "pictures": (
        lambda folder: [Image.new("RGB", (8, 8)).save(folder / f"{n}.png") for n in range(5)],
        "is no model: it holds 0.png, 1.png, 2.png and 2 more",
    ),
    "gguf": (alone("x.gguf", content(b"GGUF\3\0\0\0" + bytes(16))), "holds x.gguf, which holds no tensors"),
    "lora": (alone("x.safetensors", tensors("a.lora_A.weight")), "holds x.safetensors, which is a LoRA"),
    "peft": (alone("adapter_config.json", content(b"{}")), f"holds a LoRA of PEFT's, no model: {LORA}"),
    "flux": (
        lambda folder: configured(folder, "transformer", "FluxTransformer2DModel"),
        "holds a model of FLUX.1 (FluxTransformer2DModel), and its name does not tell which: say which model it "
        "derives from with --base-model, one of schnell, dev",
    ),
    "qwen": (
        lambda folder: configured(folder, "transformer", "QwenImageTransformer2DModel"),
        "holds a model of Qwen-Image (QwenImageTransformer2DModel)",
    ),
    "sdxl": (
        lambda folder: configured(folder, "unet", "UNet2DConditionModel"),
        "holds a model of another kind (UNet2DConditionModel), which this version does not build",
    ),
    "sd3": (
        lambda folder: configured(folder, "", "StableDiffusion3Pipeline"),
        "holds a model of another kind (StableDiffusion3Pipeline)",
    ),
    "language": (
        lambda folder: (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]})),
        "holds a model of another kind (Qwen3ForCausalLM)",
    ),
    "several": (
        lambda folder: [tensors("a")(folder / f"{n}.safetensors") for n in range(2)],
        "holds 2 .safetensors files and no model in the diffusers layout: give one of the files",
    ),
    "above": (
        lambda folder: configured(folder / "inner", "", "FluxPipeline"),
        "is no model itself: give the folder in it that is one, thing/inner",
    ),
    "cache": (
        lambda folder: (folder / "models--a--b").mkdir(),
        "is a cache of Hugging Face's with several repositories: give one of them, as thing/models--a--b",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder(kind, cli, in_folder):
    write, told = FOLDERS[kind]
    (in_folder / "thing").mkdir()
    write(in_folder / "thing")
    for command in (["generate", "--prompt", "x"], ["save", "--path", "saved"]):
        result = cli(*command, "--model", "thing")
        assert result.status == 2 and result.errors[0].startswith(f"error: thing {told}")
        assert len(result.errors) == 1 and not (in_folder / "saved").exists()
    # Whatever it is called, it is no FLUX.1.
    (in_folder / "thing").rename("my-dev")
    result = cli("generate", "--prompt", "x", "--model", "my-dev")
    assert result.status == 1 and len(result.errors) == 1
    if kind != "flux":
        named = told.partition(": ")[0].replace("thing", "my-dev").partition(", and its name")[0]
        assert named in result.errors[0] or "is missing" in result.errors[0] or "holds a" in result.errors[0]


def test_one_component_of_a_model(cli, in_folder, tiny_schnell):
    shutil.copytree(tiny_schnell, "model")
    result = cli("generate", "--prompt", "x", "--model", "model/transformer")
    told = "model/transformer is one component of a model (FluxTransformer2DModel): give the whole folder, model"
    assert (result.status, result.errors) == (2, [f"error: {told}"])


def test_a_transformer_in_one_file(cli, in_folder, tiny_schnell):
    (source,) = (tiny_schnell / "transformer").glob("*.safetensors")
    shutil.copyfile(source, "thing.safetensors")
    result = cli("generate", "--prompt", "x", "--model", "thing.safetensors")
    # Its tensors tell that it is schnell, whose other parts are not here.
    assert result.status == 1 and result.errors[0].startswith("error: black-forest-labs/FLUX.1-schnell is not in")
    assert "taken for" not in result.err


def test_an_array_of_numpy(cli, in_folder):
    np.save("x.npy", np.zeros(3))
    assert "is an array of numpy's" in cli("generate", "--model", "./x.npy", "--prompt", "x").errors[0]

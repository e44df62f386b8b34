"""FLUX.1 from the files that people have: one file for the transformer or for all, float8, GGUF, other encoders."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from support.gguf_files import f32, q8_0, random_blocks, write_gguf
from support.tiny import write_checkpoint

from families.flux.test_single_file import original
from mflux.backend import mx
from mflux.checkpoints.loading import FolderTensors
from mflux.checkpoints.stored import tensors as stored
from mflux.errors import CheckpointError, ModelConfigError
from mflux.models.common.config import ModelConfig
from mflux.models.common.config.model_config import key_of
from mflux.models.flux.variants.txt2img.flux import Flux1

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": [4, 14, 14]}
SETTINGS = {"seed": 1, "prompt": "a red circle", "num_inference_steps": 2, "width": 64, "height": 64}


def numbers(tensors) -> dict[str, mx.array]:
    return {name: tensors[name] for name in tensors}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "tiny-dev"
    # What no shape tells is as published: a file has no configuration.
    changes = {
        "transformer": _HEADS,
        "text_encoder": {"num_attention_heads": 1},
        "text_encoder_2": {"relative_attention_max_distance": 128},
        "vae": {"block_out_channels": [32, 32, 64, 64], "norm_num_groups": 32},
    }
    return write_checkpoint(folder, seed=3, guidance=True, wide=True, changes=changes)


@pytest.fixture(autouse=True)
def asked(folder, monkeypatch) -> list[list[str]]:
    """The folder stands for the repository that all but the file comes from."""
    asked = []

    def resolve(name, components, beside, **_):
        asked.append(sorted(component.folder for component in components))
        return folder if str(name).startswith("black-forest-labs") else Path(name)

    monkeypatch.setattr("mflux.models.common.model.resolve", resolve)
    return asked


def image(key: str = "dev", **arguments) -> np.ndarray:
    pipeline = Flux1(model_config=ModelConfig.from_name(key), **arguments)
    return np.asarray(pipeline.generate_image(**SETTINGS).image).astype(int)


@pytest.fixture(scope="module")
def whole(folder) -> np.ndarray:
    pipeline = Flux1(model_path=str(folder), model_config=ModelConfig.dev())
    return np.asarray(pipeline.generate_image(**SETTINGS).image).astype(int)


@pytest.fixture(scope="module")
def transformer(folder) -> dict[str, mx.array]:
    return original(numbers(FolderTensors(folder / "transformer")))


def is_matrix(name: str, value: mx.array) -> bool:
    return value.ndim == 2 and name.endswith("weight")


# What each tensor of a file becomes: for a matrix, and the file's whole.
def half(tensors):
    return {name: value.astype(mx.float16) for name, value in tensors.items()}


def float8(tensors):
    return {name: mx.to_fp8(value) if is_matrix(name, value) else value for name, value in tensors.items()}


def scaled(tensors):
    """As ComfyUI writes it; float8 lies in bytes, which the notes tell."""
    found = {}
    for name, value in tensors.items():
        if is_matrix(name, value):
            stem, scale = name.removesuffix(".weight"), mx.abs(value).max() / 448
            found[f"{stem}.comfy_quant"] = mx.array(np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8))
            found[f"{stem}.weight_scale"] = scale
            value = mx.to_fp8(value / scale)
        found[name] = value
    return found


def plain_float8(path: Path, tensors) -> None:
    """MLX writes bytes; their dtype is put right in the header."""
    mx.save_safetensors(str(path), tensors)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"U8"', b'"F8_E4M3"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def gguf_of(tensors) -> dict:
    return {
        name: q8_0(np.array(value)) if is_matrix(name, value) else f32(np.array(value))
        for name, value in tensors.items()
    }


def write(kind: str, tensors, path: Path) -> Path:
    if kind == "Q8_0":
        return write_gguf(path.with_suffix(".gguf"), gguf_of(tensors), {"general.architecture": "flux"})
    if kind == "float8":
        plain_float8(path, float8(tensors))
    else:
        mx.save_safetensors(str(path), {"float16": half, "scaled float8": scaled}.get(kind, dict)(tensors))
    return path


# How far apart images may be, at most and in the mean; of those that are exact, from the same numbers in a folder.
KINDS = {"float32": (0, 0), "float16": (1, 0.1), "float8": (3, 0.5), "Q8_0": (3, 0.5), "scaled float8": (12, 1.5)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_transformer_in_each_kind_of_file(kind, folder, transformer, whole, tmp_path, asked):
    file = write(kind, transformer, tmp_path / "mine.safetensors")
    expected = whole
    if kind not in ("float32", "float16"):
        # The numbers that the file has, in a diffusers folder.
        dense = Flux1(model_path=str(file), model_config=ModelConfig.dev()).folder
        dense.packs = False
        other = tmp_path / "folder"
        for part in folder.iterdir():
            (other / part.name).parent.mkdir(exist_ok=True)
            (other / part.name).symlink_to(part) if part.name != "transformer" else None
        (other / "transformer").mkdir()
        (other / "transformer" / "config.json").write_bytes((folder / "transformer" / "config.json").read_bytes())
        values = {name: mx.contiguous(value) for name, value in numbers(dense.tensors("transformer")).items()}
        mx.save_safetensors(str(other / "transformer" / "diffusion_pytorch_model.safetensors"), values)
        expected = image(model_path=str(other))
    asked.clear()
    stored._said.clear()
    ours = image(str(file), model_path=str(file))
    assert asked[0] == ["text_encoder", "text_encoder_2", "vae"]
    most, mean = KINDS[kind]
    difference = np.abs(ours - expected)
    assert difference.max() <= most and difference.mean() <= mean
    assert kind in ("float32", "float16") or (np.abs(ours - whole) > 0).any()


def test_bits_that_are_asked_for_are_packed_from_the_numbers(transformer, tmp_path):
    file = write("Q8_0", transformer, tmp_path / "mine")
    four = Flux1(4, model_path=str(file), model_config=ModelConfig.dev())
    layer = four.transformer.transformer_blocks[0].attn.to_q
    assert (layer.bits, layer.group_size) == (4, 64) and four.bits == 4
    as_it_is = Flux1(model_path=str(file), model_config=ModelConfig.dev())
    layer = as_it_is.transformer.transformer_blocks[0].attn.to_q
    assert (layer.bits, layer.group_size, layer.scales.dtype) == (8, 32, mx.float16) and as_it_is.bits == 8


_LDM = (
    (r"^(en|de)coder\.conv_norm_out\.", r"\1coder.norm_out."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."), (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"^encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.down.\1.block."),
    (r"^encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)  # fmt: skip


def authors_autoencoder(tensors) -> dict[str, mx.array]:
    found = {}
    for name, value in tensors.items():
        if re.search(r"attentions\.0\.to_.*weight$", name):
            value = value[:, :, None, None]
        for pattern, new in _LDM:
            name = re.sub(pattern, new, name)
        if up := re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers\.0)\.(.*)", name):
            kind = "block" if up[2] == "resnets" else "upsample"
            name = f"decoder.up.{3 - int(up[1])}.{kind}.{up[3]}"
        found[name] = value
    return found


def test_a_checkpoint_with_everything_in_it(folder, transformer, whole, tmp_path, asked):
    parts = {part: numbers(FolderTensors(folder / part)) for part in ("text_encoder", "text_encoder_2", "vae")}
    parts["text_encoder_2"]["encoder.embed_tokens.weight"] = parts["text_encoder_2"]["shared.weight"]
    tensors = {f"model.diffusion_model.{name}": value for name, value in transformer.items()}
    tensors |= {f"text_encoders.clip_l.transformer.{name}": value for name, value in parts["text_encoder"].items()}
    tensors |= {f"text_encoders.t5xxl.transformer.{name}": value for name, value in parts["text_encoder_2"].items()}
    tensors |= {f"vae.{name}": value for name, value in authors_autoencoder(parts["vae"]).items()}
    tensors["text_encoders.clip_l.logit_scale"] = mx.array(4.6)
    file = tmp_path / "everything.safetensors"
    mx.save_safetensors(str(file), tensors)
    assert np.array_equal(image("dev", model_path=str(file)), whole)
    # Tokenizers and schedule are the repository's.
    assert asked == [[]]


def t5_in_gguf(tensors) -> dict:
    names = {
        "shared.": "token_embd.", "encoder.final_layer_norm.": "enc.output_norm.",
        ".layer.0.SelfAttention.relative_attention_bias.": ".attn_rel_b.", ".layer.0.layer_norm.": ".attn_norm.",
        ".layer.1.layer_norm.": ".ffn_norm.", ".layer.1.DenseReluDense.wi_0.": ".ffn_gate.",
        ".layer.1.DenseReluDense.wi_1.": ".ffn_up.", ".layer.1.DenseReluDense.wo.": ".ffn_down.",
        **{f".layer.0.SelfAttention.{part}.": f".attn_{part}." for part in "qkvo"},
    }  # fmt: skip
    found = {}
    for name, value in tensors.items():
        if name == "encoder.embed_tokens.weight":
            continue
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        found[name.replace("encoder.block.", "enc.blk.")] = value
    return found


def test_parts_from_elsewhere(folder, whole, tmp_path):
    clip, t5, vae = (numbers(FolderTensors(folder / part)) for part in ("text_encoder", "text_encoder_2", "vae"))
    mx.save_safetensors(str(tmp_path / "clip_l.safetensors"), clip)
    mx.save_safetensors(str(tmp_path / "ae.safetensors"), authors_autoencoder(vae))
    encoded = {name: f32(np.array(value)) for name, value in t5_in_gguf(t5).items()}
    write_gguf(tmp_path / "t5.gguf", encoded, {"general.architecture": "t5encoder"})
    files = {
        "text_encoder_paths": [str(tmp_path / "t5.gguf"), str(tmp_path / "clip_l.safetensors")],
        "vae_path": str(tmp_path / "ae.safetensors"),
    }
    assert np.array_equal(image(**files), whole)
    folders = {
        "text_encoder_paths": [str(folder / "text_encoder_2"), str(folder / "text_encoder")],
        "vae_path": str(folder / "vae"),
    }
    pipeline = Flux1(model_config=ModelConfig.dev(), **folders)
    made = pipeline.generate_image(**SETTINGS)
    assert np.array_equal(np.asarray(made.image).astype(int), whole)
    assert (made.text_encoder_paths, made.vae_path) == tuple(folders.values())


def test_a_part_that_is_none_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no vae of FLUX\.1"):
        Flux1(model_config=ModelConfig.dev(), vae_path=str(folder / "text_encoder" / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"holds no text encoder or text encoder 2 of FLUX\.1"):
        Flux1(model_config=ModelConfig.dev(), text_encoder_paths=[str(folder / "vae")])


# ---- which model a file is


def changed(transformer, **widths):
    found = dict(transformer)
    if widths.get("channels"):
        found["img_in.weight"] = mx.zeros((64, widths["channels"]))
    if not widths.get("guidance", True):
        found = {name: value for name, value in found.items() if not name.startswith("guidance_in")}
    return found


VARIANTS = {
    "schnell": ({"guidance": False}, "schnell"), "dev": ({}, "dev"), "Fill": ({"channels": 384}, "dev-fill"),
    "Depth": ({"channels": 128}, "dev-depth"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "key"), VARIANTS.values(), ids=VARIANTS)
def test_tensors_tell_which_model_it_is(change, key, transformer, tmp_path, caplog):
    for name in ("whatever.safetensors", "schnell.safetensors", "flux1-dev-fp8.safetensors"):
        file = str(tmp_path / name)
        mx.save_safetensors(file, changed(transformer, **change))
        assert key_of(file) == key
    told = [record.getMessage() for record in caplog.records]
    assert any("is taken for dev: if it is krea-dev, dev-kontext" in line for line in told) == (key == "dev")
    for other in ("z-image", "demo"):
        with pytest.raises(ModelConfigError, match=f"is no {other} by its tensors: say --base-model {key}"):
            key_of(file, other)


def test_a_name_tells_what_tensors_cannot(transformer, tmp_path):
    for name, key in {
        "flux1-krea-dev_fp8.safetensors": "krea-dev",
        "flux1-kontext-dev.safetensors": "dev-kontext",
    }.items():
        mx.save_safetensors(str(tmp_path / name), transformer)
        assert key_of(str(tmp_path / name)) == key
    assert key_of(str(tmp_path / name), "krea-dev") == "krea-dev"


OTHERS = {
    "a LoRA": ({"double_blocks.0.img_attn.qkv.lora_A.weight": mx.zeros((4, 4))}, "is a LoRA, no model"),
    "SDXL": (
        {"model.diffusion_model.input_blocks.0.0.weight": mx.zeros((4, 4)),
         "model.diffusion_model.label_emb.0.0.weight": mx.zeros((4, 4))}, "is a checkpoint of SDXL"),
    "SD 1.5": ({"model.diffusion_model.input_blocks.0.0.weight": mx.zeros((4, 4))}, "of Stable Diffusion 1 or 2"),
    "SD 3": ({"model.diffusion_model.joint_blocks.0.x.weight": mx.zeros((4, 4))}, "checkpoint of Stable Diffusion 3"),
    "a ControlNet": ({"controlnet_blocks.0.weight": mx.zeros((4, 4))}, "is a ControlNet"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "told"), OTHERS.values(), ids=OTHERS)
def test_what_is_another_model_is_named(tensors, told, tmp_path):
    mx.save_safetensors(str(tmp_path / "mine.safetensors"), tensors)
    with pytest.raises(ModelConfigError, match=told):
        key_of(str(tmp_path / "mine.safetensors"))


def test_a_language_model_in_gguf_is_named(tmp_path):
    content = {
        "token_embd.weight": random_blocks("Q4_K", (4, 256)),
        "blk.0.attn_q.weight": random_blocks("Q4_K", (4, 256)),
    }
    write_gguf(tmp_path / "mine.gguf", content, {"general.architecture": "llama"})
    with pytest.raises(ModelConfigError, match="is a language model"):
        key_of(str(tmp_path / "mine.gguf"))


# ---- what the commands say of such files, and make of them


def test_convert_check_and_info(transformer, tmp_path, cli, in_folder, whole):
    file = write("Q8_0", transformer, tmp_path / "mine")
    told = cli("info", file)
    assert told.status == 0 and "transformer of FLUX.1 (dev or krea-dev or dev-kontext); " in told.out, told.out
    assert "G parameters as Q8_0, float32, " in told.out
    checked = cli("check", "model", file)
    assert "check: pass" in checked.out and "model: dev\nformat: gguf" in checked.out and "holds: " in checked.out
    listed = cli("convert", file, "--list")
    assert "double_blocks.0.img_attn.qkv.weight\tQ8_0\t[192, 64]" in listed.out
    # Packed as it is, and dense for other programs.
    for words, kinds in (((), {"uint32", "float16", "float32"}), (("--dtype", "float32"), {"float32"})):
        done = cli("convert", file, "made.safetensors", "--force", *words)
        assert done.status == 0, done.err
        made = mx.load("made.safetensors")
        assert {str(value.dtype).rpartition(".")[2] for value in made.values()} == kinds
        ours = [image(model_path=str(one)) for one in (file, in_folder / "made.safetensors")]
        assert np.abs(ours[0] - ours[1]).max() <= (0 if not words else 3)


def test_saved_and_generated_through_the_commands(transformer, tmp_path, cli, in_folder, folder):
    file = write("Q8_0", transformer, tmp_path / "flux1-dev-Q8_0")
    words = ("--prompt", "a red circle", "--steps", 2, "--width", 64, "--height", 64, "--seed", 1)
    parts = ("--vae", folder / "vae", "--text-encoder", folder / "text_encoder_2")
    done = cli("generate", "--model", file, *parts, *words)
    assert done.status == 0, done.err
    again = cli(
        "generate", "-C", done.paths[0], "--model", file, "--output", "again.png", "--text-encoder", folder / "vae"
    )
    assert again.status == 1 and "holds no text encoder or text encoder 2 of FLUX.1" in again.err
    saved = cli("save", "--model", file, *parts, "--path", "saved")
    assert saved.status == 0, saved.err
    from_saved = cli("generate", "--model", "saved", *words, "--output", "saved.png")
    assert from_saved.status == 0, from_saved.err
    import PIL.Image

    images = [np.asarray(PIL.Image.open(path)) for path in (done.paths[0], from_saved.paths[0])]
    assert np.array_equal(*images)


def test_a_lora_beside_packed_weights(transformer, tmp_path):
    file, lora = write("Q8_0", transformer, tmp_path / "mine"), tmp_path / "style.safetensors"
    down, up = (mx.random.normal(shape, key=mx.random.key(n)) for n, shape in enumerate(((4, 64), (64, 4))))
    layer = "transformer.transformer_blocks.0.attn.to_q"
    mx.save_safetensors(str(lora), {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up})
    plain, changed = (
        Flux1(model_path=str(file), model_config=ModelConfig.dev(), lora_paths=paths).transformer
        for paths in (None, [str(lora)])
    )
    x = mx.random.normal((1, 5, 64), key=mx.random.key(9))
    before, after = (one.transformer_blocks[0].attn.to_q for one in (plain, changed))
    assert after.linear.bits == before.bits == 8
    expected = before(x) + (x @ down.T) @ up.T
    assert np.allclose(np.array(after(x)), np.array(expected), atol=1e-3)

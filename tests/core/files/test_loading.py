"""From files to modules: every tensor to its parameter, in MLX's layout, or an error that says which did not fit."""

from __future__ import annotations

import json
import re
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mflux.backend import compute_dtype, mx, nn, tree_flatten
from mflux.checkpoints.folders import read_json
from mflux.checkpoints.loading import FileDifferences, FolderTensors, load_component
from mflux.checkpoints.readers.safetensors import SafetensorsFile, float8_values, read_header
from mflux.errors import CheckpointError
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.text_encoders.clip import CLIPTextEncoder
from mflux.models.common.networks.text_encoders.t5 import T5Encoder

REMEDY = "; fetch it again, or take the config.json that belongs to these weights"


@dataclass(frozen=True)
class SmallConfig(ComponentConfig):
    width: int = 4


class Small(nn.Module):
    """One of each kind of layer whose kernels files hold in another layout."""

    config_class = SmallConfig

    def __init__(self, config: SmallConfig):
        super().__init__()
        self.linear = nn.Linear(3, config.width)
        self.blocks = [{"norm": nn.RMSNorm(config.width)}]
        self.conv1 = nn.Conv1d(2, config.width, 3)
        self.conv2 = nn.Conv2d(2, config.width, (3, 5))
        self.conv3 = nn.Conv3d(2, config.width, (1, 2, 3))
        self.up = nn.ConvTranspose2d(2, config.width, (2, 3), stride=2)


def small_tensors() -> dict[str, np.ndarray]:
    """As a file holds them: kernels with their channels first."""
    shapes = {
        "linear.weight": (4, 3), "linear.bias": (4,), "blocks.0.norm.weight": (4,),
        "conv1.weight": (4, 2, 3), "conv1.bias": (4,), "conv2.weight": (4, 2, 3, 5), "conv2.bias": (4,),
        "conv3.weight": (4, 2, 1, 2, 3), "conv3.bias": (4,), "up.weight": (2, 4, 2, 3), "up.bias": (4,),
    }  # fmt: skip
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int8": "I8"}
NAMES |= {"uint8": "U8", "uint16": "U16", "bool": "BOOL", "complex64": "C64"}


def write(path: Path, tensors: dict, metadata: dict | None = None) -> None:
    """A safetensors file of arrays, or of (dtype's name, shape, bytes), written by hand."""
    header, data = ({"__metadata__": metadata} if metadata else {}), b""
    for name, value in tensors.items():
        if isinstance(value, np.ndarray):
            value = NAMES[value.dtype.name], value.shape, value.tobytes()
        dtype, shape, content = value
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path / "model.safetensors", small_tensors())
    return tmp_path


def change(folder: Path, **changes) -> None:
    """Write the file again with some tensors changed, left out (None), or added."""
    tensors = small_tensors() | {name.replace("__", "."): value for name, value in changes.items()}
    write(folder / "model.safetensors", {name: value for name, value in tensors.items() if value is not None})


# ---- layout


def test_every_tensor_finds_its_parameter(folder):
    module = load_component(Small, folder)
    stored = small_tensors()
    assert np.array_equal(module.linear.weight, stored["linear.weight"])
    assert np.array_equal(module.blocks[0]["norm"].weight, stored["blocks.0.norm.weight"])
    assert np.array_equal(module.conv1.weight, stored["conv1.weight"].transpose(0, 2, 1))
    assert np.array_equal(module.conv2.weight, stored["conv2.weight"].transpose(0, 2, 3, 1))
    assert np.array_equal(module.conv3.weight, stored["conv3.weight"].transpose(0, 2, 3, 4, 1))
    assert np.array_equal(module.up.weight, stored["up.weight"].transpose(1, 2, 3, 0))
    for name in ("linear.bias", "conv1.bias", "conv2.bias", "conv3.bias", "up.bias"):
        assert np.array_equal(dict(tree_flatten(module.parameters()))[name], stored[name])


def test_what_is_loaded_is_there_to_be_used(folder):
    module = load_component(Small, folder)
    assert not module.training
    assert tree_flatten(module.trainable_parameters()) == []


def test_a_convolution_does_what_its_file_says(folder):
    """By the definition of a convolution over the kernel as it is stored."""
    module, stored = load_component(Small, folder), small_tensors()
    image = np.random.default_rng(1).normal(size=(2, 6, 7)).astype(np.float32)
    kernel = stored["conv2.weight"]
    windows = np.lib.stride_tricks.sliding_window_view(image, (3, 5), axis=(1, 2))
    expected = np.einsum("ihwyx,oiyx->ohw", windows, kernel) + stored["conv2.bias"][:, None, None]
    found = module.conv2(mx.array(image.transpose(1, 2, 0)[None]))[0]
    assert np.allclose(np.array(found).transpose(2, 0, 1), expected, atol=1e-5)


def test_a_transposed_convolution_does_what_its_file_says(folder):
    module, stored = load_component(Small, folder), small_tensors()
    image = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    expected = np.zeros((4, 2 * 3, 2 * 3 + 3), np.float32) + stored["up.bias"][:, None, None]
    for y in range(3):
        for x in range(4):
            patch = np.einsum("i,ioyx->oyx", image[:, y, x], stored["up.weight"])
            expected[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 3] += patch
    found = module.up(mx.array(image.transpose(1, 2, 0)[None]))[0]
    assert np.allclose(np.array(found).transpose(2, 0, 1), expected, atol=1e-5)


# ---- strictness


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"linear__bias": None}, "1 tensor missing (linear.bias)"),
        ({"more": np.ones(2)}, "1 tensor left over (more)"),
        (
            {"linear__bias": None, "up__bias": None, "linear__b": np.ones(4)},
            "2 tensors missing (linear.bias, up.bias) and 1 tensor left over (linear.b)",
        ),
        ({f"more{n}": np.ones(1) for n in range(7)}, "7 tensors left over (more0, more1, more2, more3, more4, …)"),
        ({"linear__weight": np.ones((3, 4))}, "linear.weight has the shape [3, 4] instead of [4, 3]"),
        (
            {"conv2__weight": np.ones((4, 3, 5, 2))},
            "conv2.weight has the shape [4, 5, 2, 3] instead of [4, 3, 5, 2] (as MLX lays them out)",
        ),
        (
            {"conv2__weight": np.ones((4,))},
            "conv2.weight has the shape [4] instead of [4, 3, 5, 2] (as MLX lays them out)",
        ),
        (
            {"linear__weight": np.ones((4, 3), np.int8)},
            "linear.weight holds mlx.core.int8 where floating-point numbers belong",
        ),
    ],
)
def test_what_does_not_fit(folder, changes, told):
    change(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        load_component(Small, folder)
    assert str(caught.value) == f"{folder} does not fit the Small of its config.json: {told}{REMEDY}"


def test_the_configuration_decides(folder):
    (folder / "config.json").write_text('{"width": 5, "unknown": [1]}')
    with pytest.raises(CheckpointError, match=r"linear\.weight has the shape \[4, 3\] instead of \[5, 3\]"):
        load_component(Small, folder)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "is damaged: it is not a JSON object; fetch it again"),
        ("{]", "is damaged: it is not JSON; fetch it again"),
        ("{", "is truncated: it ends in the middle of its JSON; fetch it again"),
        (b"\xff", "is damaged: it is not UTF-8 text; fetch it again"),
        (None, "is missing: the folder is not a complete model in the diffusers layout"),
    ],
)
def test_a_configuration_that_is_none(tmp_path, content, told):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    assert str(caught.value) == f"{path} {told}"


@pytest.mark.parametrize("width", ["four", None, [4], -1, 1.5])
def test_a_configuration_that_makes_no_sense(folder, width):
    """What a class cannot be built from is the file's fault, not a bug."""

    @dataclass(frozen=True)
    class Config(SmallConfig):
        def check(self):
            return f"a width of {self.width} is too small" if range(self.width).stop < 0 else None

    class Checked(Small):
        config_class = Config

    (folder / "config.json").write_text(json.dumps({"width": width}))
    with pytest.raises(CheckpointError, match=re.escape(str(folder / "config.json"))):
        load_component(Checked, folder)


def test_lists_of_a_configuration_are_frozen():
    @dataclass(frozen=True)
    class Config(ComponentConfig):
        sizes: tuple[tuple[int, ...], ...] = ()

    assert Config.from_dict({"sizes": [[1, 2], [3]], "other": 1}).sizes == ((1, 2), (3,))


# ---- exceptions, as the text encoders have them


@pytest.fixture
def clip(tiny_schnell, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_schnell / "text_encoder", tmp_path / "text_encoder"))


@pytest.fixture
def t5(tiny_schnell, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_schnell / "text_encoder_2", tmp_path / "text_encoder_2"))


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = {name: mx.array(value) for name, value in mx.load(str(path)).items()}
    mx.eval(tensors)
    mx.save_safetensors(str(path), change(tensors))


def parameters(module: nn.Module) -> dict[str, list]:
    return {name: value.tolist() for name, value in tree_flatten(module.parameters())}


def test_clip_with_and_without_its_prefix(clip):
    whole = parameters(load_component(CLIPTextEncoder, clip))
    rewrite(clip, lambda tensors: {name.removeprefix("text_model."): value for name, value in tensors.items()})
    assert parameters(load_component(CLIPTextEncoder, clip)) == whole


def test_clip_with_half_of_its_prefixes(clip):
    name = "text_model.final_layer_norm.bias"
    rewrite(clip, lambda tensors: tensors | {"final_layer_norm.bias": tensors.pop(name)})
    told = r"1 tensor missing \(text_model.final_layer_norm.bias\) and 1 tensor left over \(final_layer_norm.bias\)"
    with pytest.raises(CheckpointError, match=told):
        load_component(CLIPTextEncoder, clip)


def test_clip_with_positions_that_nothing_needs(clip):
    name = "text_model.embeddings.position_ids"
    rewrite(clip, lambda tensors: tensors | {name: mx.arange(24)[None]})
    load_component(CLIPTextEncoder, clip)
    rewrite(clip, lambda tensors: tensors | {"my_position_ids": mx.arange(24)[None]})
    with pytest.raises(CheckpointError, match=r"1 tensor left over \(my_position_ids\)"):
        load_component(CLIPTextEncoder, clip)


def test_t5_under_either_name_of_its_embedding(t5):
    whole = parameters(load_component(T5Encoder, t5))
    both = "encoder.embed_tokens.weight"
    rewrite(t5, lambda tensors: tensors | {both: tensors["shared.weight"]})
    assert parameters(load_component(T5Encoder, t5)) == whole
    rewrite(t5, lambda tensors: {name: value for name, value in tensors.items() if name != "shared.weight"})
    assert parameters(load_component(T5Encoder, t5)) == whole
    rewrite(t5, lambda tensors: {name: value for name, value in tensors.items() if name != both})
    with pytest.raises(CheckpointError, match=r"1 tensor missing \(shared\.weight\)"):
        load_component(T5Encoder, t5)


def test_a_class_without_exceptions_has_none(folder):
    change(folder, position_ids=np.ones(2))
    with pytest.raises(CheckpointError, match=r"left over \(position_ids\)"):
        load_component(Small, folder)
    Lenient = type("Lenient", (Small,), {"differences": FileDifferences(ignored=("^position_ids$",))})
    load_component(Lenient, folder)


# ---- one file or several


def shards(folder: Path, parts: dict[str, list[str]], index: str = "model.safetensors.index.json") -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    tensors = small_tensors()
    for file, names in parts.items():
        write(folder / file, {name: tensors[name] for name in names})
    weight_map = {name: file for file, names in parts.items() for name in names}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def halves() -> dict[str, list[str]]:
    names = list(small_tensors())
    return {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}


def test_shards_make_one_whole(folder, halves):
    whole = parameters(load_component(Small, folder))
    shards(folder, halves)
    assert parameters(load_component(Small, folder)) == whole


def test_a_shard_that_is_missing(folder, halves):
    shards(folder, halves)
    (folder / "model-2-of-2.safetensors").unlink()
    told = f"{folder} is incomplete: 1 of 2 weight files are missing, such as model-2-of-2.safetensors: fetch it again"
    with pytest.raises(CheckpointError, match=re.escape(told)):
        load_component(Small, folder)


def test_a_shard_outside_the_folder(folder, halves):
    shards(folder, halves)
    (folder / "model-2-of-2.safetensors").rename(folder.parent / "model-2-of-2.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-2", "../model-2"))
    with pytest.raises(CheckpointError, match="1 of 2 weight files are missing"):
        load_component(Small, folder)


def test_a_tensor_in_two_shards(folder, halves):
    halves["model-1-of-2.safetensors"].append("linear.bias")
    shards(folder, halves)
    with pytest.raises(CheckpointError, match=r"the tensor linear\.bias stands in two files"):
        load_component(Small, folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(folder, content):
    index = folder / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(CheckpointError) as caught:
        load_component(Small, folder)
    assert str(caught.value) == f"{index} is damaged: it has no table of shards; fetch it again"


def test_variants_beside_each_other(folder, halves):
    """Repositories hold fp16 files beside the plain ones, which are the ones to take."""
    whole = parameters(load_component(Small, folder))
    write(folder / "model.fp16.safetensors", {"nothing": np.ones(1)})
    assert parameters(load_component(Small, folder)) == whole
    shards(folder, halves)
    (folder / "model.safetensors.index.fp16.json").write_text("{}")
    (folder / "model.fp16.safetensors.index.json").write_text("{}")
    assert parameters(load_component(Small, folder)) == whole


def test_two_files_and_nothing_that_tells(folder):
    write(folder / "other.safetensors", small_tensors())
    told = f"{folder} holds 2 .safetensors files and no index that says which to take: leave one there"
    with pytest.raises(CheckpointError, match=re.escape(told)):
        load_component(Small, folder)


def test_the_names_of_a_folder(folder, halves):
    shards(folder, halves)
    tensors = FolderTensors(folder)
    assert len(tensors) == 11
    assert set(tensors) == set(small_tensors())
    assert "linear.weight" in tensors
    assert "nonsense" not in tensors


# ---- dtypes


def bfloat16(values: np.ndarray) -> bytes:
    """The upper half of each float32, little-endian; for values that have nothing in the lower one."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"])
def test_every_floating_point_format(folder, dtype):
    values = np.array([1.0, -2.5, 3.0, 0.5])
    content = {
        "F16": values.astype("<f2").tobytes(),
        "BF16": bfloat16(values),
        "F32": values.astype("<f4").tobytes(),
        "F64": values.astype("<f8").tobytes(),
        "F8_E4M3": bytes([0x38, 0xC2, 0x44, 0x30]),
        "F8_E5M2": bytes([0x3C, 0xC1, 0x42, 0x38]),
    }[dtype]
    change(folder, linear__bias=(dtype, (4,), content))
    module = load_component(Small, folder)
    assert module.linear.bias.tolist() == values.tolist()
    stored = {"F16": mx.float16, "BF16": mx.bfloat16}.get(dtype, mx.float32)
    assert module.linear.bias.dtype == compute_dtype(stored)
    # The other tensors of the file, which MLX alone would refuse along with it.
    assert np.array_equal(module.conv2.weight, small_tensors()["conv2.weight"].transpose(0, 2, 3, 1))


def test_a_dtype_may_be_asked_for(folder):
    module = load_component(Small, folder, dtype=mx.float16)
    assert {value.dtype for _, value in tree_flatten(module.parameters())} == {mx.float16}
    kept = load_component(Small, folder, keep_dtypes=True)
    assert {value.dtype for _, value in tree_flatten(kept.parameters())} == {mx.float32}


@pytest.mark.parametrize("beside", [{}, {"double": np.ones(2)}], ids=["alone", "beside float64"])
def test_a_file_of_everything(tmp_path, beside):
    """All formats read alike, whether MLX reads the file or, for the sake of one tensor, mflux does."""
    path = tmp_path / "all.safetensors"
    numbers = np.array([[0, 1, 2], [125, 126, 127]])
    names = ("float32", "float16", "int64", "int32", "int8", "uint8", "uint16", "bool")
    tensors = {name: numbers.astype(name) for name in names}
    tensors["complex64"] = (numbers + 2j).astype(np.complex64)
    tensors["scalar"] = np.array(7, np.float32)
    tensors["empty"] = np.zeros((0, 3), np.float32)
    write(path, tensors | beside | {"brain": ("BF16", (2, 3), bfloat16(numbers))}, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt"}
    for name, value in tensors.items():
        found = np.array(file[name])
        assert found.dtype == value.dtype, name
        assert np.array_equal(found, value), name
        assert found.shape == value.shape, name
    assert file["brain"].dtype == mx.bfloat16
    assert file["brain"].astype(mx.float32).tolist() == numbers.tolist()


def test_eight_bit_floats():
    """Values from the paper's tables, and the order that both formats share with their codes."""
    small, large = float8_values("F8_E4M3"), float8_values("F8_E5M2")
    expected = {0x00: 0, 0x01: 2**-9, 0x07: 0.875 * 2**-6, 0x08: 2**-6, 0x38: 1, 0x7E: 448, 0xFE: -448}
    assert {code: small[code] for code in expected} == expected
    expected = {0x00: 0, 0x01: 2**-16, 0x03: 0.75 * 2**-14, 0x04: 2**-14, 0x3C: 1, 0x7B: 57344, 0x7C: np.inf}
    assert {code: large[code] for code in expected} == expected
    assert np.flatnonzero(np.isnan(small)).tolist() == [0x7F, 0xFF]
    assert np.flatnonzero(np.isnan(large)).tolist() == [0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]
    for values, last in ((small, 0x7E), (large, 0x7C)):
        assert (np.diff(values[: last + 1]) > 0).all()
        assert np.array_equal(values[128 : 128 + last + 1], -values[: last + 1])
        assert np.signbit(values[128])


# ---- damage


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty: fetch it again"),
        (b"1234567", "is not a safetensors file: fetch it again"),
        (b"version https://example.com/spec/v1\noid sha256:0123", "is not a safetensors file: fetch it again"),
        (struct.pack("<Q", 5) + b"nojson", "is not a safetensors file: its header is not JSON; fetch it again"),
        (struct.pack("<Q", 2) + b"[]", "is not a safetensors file: its header is not a table; fetch it again"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "is not a safetensors file: its header is not JSON; fetch it again"),
        (
            struct.pack("<Q", 100) + b"{}",
            "is truncated: its header says 100 bytes but the file ends after 10: fetch it again",
        ),
    ],
)
def test_a_file_that_is_none(tmp_path, content, told):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(caught.value) == f"{path} {told}"


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"dtype": "F32"}, "is damaged: its entry for a makes no sense; fetch it again"),
        ([1], "is damaged: its entry for a makes no sense; fetch it again"),
        (None, "is damaged: its entry for a makes no sense; fetch it again"),
        (
            {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
            "is damaged: its entry for a makes no sense; fetch it again",
        ),
        (
            {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
            "is damaged: its entry for a makes no sense; fetch it again",
        ),
        (
            {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
            "is damaged: its entry for a makes no sense; fetch it again",
        ),
        (
            {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
            "is damaged: a has -4 bytes for the shape [1]; fetch it again",
        ),
        (
            {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
            "is damaged: a has 4 bytes for the shape [2]; fetch it again",
        ),
        (
            {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]},
            ": a has the dtype F4, which mflux cannot read",
        ),
        (
            {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
            "is damaged: its entry for a makes no sense; fetch it again",
        ),
    ],
)
def test_an_entry_that_makes_no_sense(tmp_path, entry, told):
    path = tmp_path / "x.safetensors"
    text = json.dumps({"a": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(caught.value) == f"{path}{'' if told.startswith(':') else ' '}{told}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"__metadata__": [1]}', "its metadata is not a table of texts"),
        ('{"__metadata__": {"format": 1}}', "its metadata is not a table of texts"),
        ('{"a": {"dtype": "F32", "shape": [0, 2147483648], "data_offsets": [0, 0]}}', "its entry for a makes no sense"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "more": NaN}}', "it holds NaN"),
        (r'{"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', r"\[json\.exception"),
    ],
)
def test_a_header_that_only_mlx_minds(tmp_path, text, told):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(16))
    with pytest.raises(CheckpointError, match=f"is damaged: {told}.*; fetch it again"):
        file = SafetensorsFile(path)
        mx.eval([file[name] for name in file])


def test_a_file_that_ends_early(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    told = f"up.bias should end at byte {len(content):,} but the file ends after {len(content) - 1:,}: fetch it again"
    with pytest.raises(CheckpointError, match=re.escape(f"{path} is truncated: {told}")):
        load_component(Small, folder)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*: Is a directory"):
        read_header(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot read .*: No such file or directory"):
        SafetensorsFile(tmp_path / "none.safetensors")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_is_told_or_harmless(tmp_path, data):
    """Whatever byte is lost or changed: an error of ours, or arrays."""
    path = tmp_path / "x.safetensors"
    double = data.draw(st.booleans())
    write(path, {"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float64 if double else np.int32)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path.write_bytes(bytes(content[:end]))
    try:
        file = SafetensorsFile(path)
        for name in file:
            mx.eval(file[name])
            assert file[name].shape == file.infos[name].shape
    except CheckpointError as error:
        assert str(path) in str(error)

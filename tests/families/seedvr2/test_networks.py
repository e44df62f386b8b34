"""SeedVR2's networks beside what the public code computed (tests/data/seedvr2), and where its weights may lie."""

from __future__ import annotations

import hashlib
import json
import re
from itertools import combinations
from math import prod
from pathlib import Path

import numpy as np
import pytest
from support.gpu import both_ways
from support.tiny import published, write_json

from families.seedvr2.cases import (
    AUTOENCODERS,
    DATA,
    TRANSFORMERS,
    Data,
    tiny_configs,
    whole_model,
    write_folder,
    write_tiny,
)
from mflux.backend import has_gpu, mx, tree_flatten
from mflux.checkpoints.loading import layout_turns, load_component, match
from mflux.checkpoints.published import PublishedFolder
from mflux.checkpoints.readers.safetensors import SafetensorsFile
from mflux.checkpoints.renamed import Renamed
from mflux.checkpoints.saved_by_024 import FolderOf024
from mflux.checkpoints.saving import save_component
from mflux.errors import CheckpointError
from mflux.models.common.config import ModelConfig
from mflux.models.common.family import families
from mflux.models.common.model import open_folder as open_family_s
from mflux.models.seedvr2 import SeedVR2
from mflux.models.seedvr2.family import FAMILY
from mflux.models.seedvr2.layouts import (
    TRANSFORMER_FILES,
    VAE_FILE,
    key_of,
    transformer_config,
    vae_config,
)
from mflux.models.seedvr2.model.autoencoder import SeedVR2Autoencoder
from mflux.models.seedvr2.model.transformer import SeedVR2Transformer, Windows, borders, window_size
from mflux.models.seedvr2.text import text_embeds

PARITY = 1e-5
# A swap must show at least this much more than what parity lets pass.
MARGIN = 50
CLASSES = {"transformer": SeedVR2Transformer, "vae": SeedVR2Autoencoder}
CONFIGS = json.loads((DATA.parent / "surface" / "configs.json").read_text(encoding="utf-8"))
FULL_SIZE = {
    "SeedVR2-3B/transformer": 3_391_475_776,
    "SeedVR2-7B/transformer": 8_239_607_872,
    "SeedVR2/vae": 250_648_227,
}


def relative_error(ours, theirs) -> float:
    ours, theirs = (np.array(value.astype(mx.float32)).astype(np.float64) for value in (ours, theirs))
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    assert np.linalg.norm(theirs) > 1e-3 * np.sqrt(theirs.size), "a reference of nearly nothing shows nothing"
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def in_float32(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    return {name: value.astype(mx.float32) for name, value in tensors.items()}


def encode(module, pixels: mx.array) -> mx.array:
    """With channels last, as the reference's data has them."""
    return module.encode(pixels.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)


def decode(module, latents: mx.array) -> mx.array:
    return module.decode(latents.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)


def predict(module, data: Data, case: str) -> mx.array:
    latents, text, time = (data.inputs[f"{case}.{name}"] for name in ("latents", "text", "time"))
    return module(latents[None], text, time)[0]


# ---- beside the reference


@both_ways
@pytest.mark.parametrize("case", ["large", "strip", "small"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer(name, case):
    data = Data(name)
    assert relative_error(predict(data.module(), data, case), data.outputs[case]) <= PARITY


@both_ways
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder(name):
    data = Data(name)
    module = data.module()
    assert relative_error(encode(module, data.inputs["pixels"]), data.outputs["encoded"]) <= PARITY
    assert relative_error(decode(module, data.inputs["latents"]), data.outputs["decoded"]) <= PARITY


@both_ways
@pytest.mark.parametrize("name", ["uneven", "even"])
def test_from_a_picture_to_a_picture(name):
    """All networks one after the other; what colours become of it is another matter."""
    file = SafetensorsFile(DATA / "whole.safetensors")
    expected = {key.removeprefix(f"{name}."): file[key] for key in file if key.startswith(f"{name}.")}
    parts = {
        part: load_component(CLASSES[part], DATA, dtype=mx.float32, config=config, tensors=in_float32(tensors))
        for part, (config, tensors) in whole_model().items()
    }
    pixels = expected["pixels"].astype(mx.float32) / 127.5 - 1
    height, width, _ = pixels.shape
    filled = mx.pad(pixels, [(0, -height % 16), (0, -width % 16), (0, 0)], constant_values=-1.0)
    condition = encode(parts["vae"], filled[None])
    noise = expected["noise"].astype(mx.float32)[None]
    latents = mx.concatenate([noise, condition, mx.ones_like(condition[..., :1])], axis=-1)
    clean = noise - parts["transformer"](latents, text_embeds(), 1000)
    decoded = decode(parts["vae"], clean)[:, :height, :width]
    for what, value in {"condition": condition, "clean": clean, "decoded": decoded}.items():
        assert relative_error(value[0], expected[what]) <= PARITY, what


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_pictures_of_a_batch_do_not_see_each_other(name):
    data = Data(name)
    module = data.module()
    large, text = data.inputs["large.latents"][:, :48], data.inputs["large.text"]
    both = mx.stack([large, large[::-1]])
    together = module(both, text, 500.0)
    alone = mx.concatenate([module(both[:1], text, 500.0), module(both[1:], text, 500.0)])
    assert relative_error(together, alone) <= 1e-6
    assert relative_error(together[0], together[1]) > 0.1


@both_ways
@pytest.mark.parametrize("dtype, bound", [(mx.float16, 3e-3), (mx.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", [*TRANSFORMERS, *AUTOENCODERS])
def test_in_16_bits_as_on_gpus(name, dtype, bound):
    """Whatever they are given, modules compute in their weights' dtype and give the result in that of the latents."""
    data = Data(name)
    module = data.module(dtype)
    if name in TRANSFORMERS:
        inputs = [data.inputs[f"strip.{part}"] for part in ("latents", "text", "time")]
        pairs = [(module(inputs[0][None].astype(dtype), *inputs[1:])[0], data.outputs["strip"])]
    else:
        pixels, latents = data.inputs["pixels"].astype(dtype), data.inputs["latents"].astype(dtype)
        pairs = [
            (encode(module, pixels), data.outputs["encoded"]),
            (decode(module, latents), data.outputs["decoded"]),
        ]
    for ours, theirs in pairs:
        assert ours.dtype == dtype
        assert PARITY < relative_error(ours, theirs) < bound


def test_the_text():
    """The published values, rounded by nothing: float16 holds them all."""
    file = SafetensorsFile(DATA / "embedding.safetensors")
    embeds = text_embeds()
    assert embeds.shape == (58, 5120)
    assert embeds.dtype == mx.float16
    values = np.array(embeds.astype(mx.float32))
    assert hashlib.sha256(values.tobytes()).hexdigest() == file.metadata["float32 sha256"]
    assert np.array_equal(values[[0, 13, 57], :64], np.array(file["rows"]))


# ---- windows


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    "rows, columns", [(1, 1), (3, 5), (30, 44), (45, 80), (135, 240), (2, 300), (301, 4), (67, 67)]
)
def test_every_patch_is_in_one_window(rows, columns, shifted):
    windows = Windows(rows, columns, (3, 3), shifted=shifted)
    order = np.array(windows.order)
    assert np.array_equal(np.sort(order), np.arange(rows * columns))
    assert np.array_equal(order[np.array(windows.back)], np.arange(rows * columns))
    assert sum(number * patches for number, patches in windows.groups) == rows * columns
    # However many windows there are, they have few shapes, and those of one shape are computed together.
    assert len(windows.groups) <= 9
    row, column, height, width = windows.places
    assert (row < height).all()
    assert (column < width).all()
    start = 0
    for number, patches in windows.groups:
        for first in range(start, start + number * patches, patches):
            inside = order[first : first + patches]
            top, left = divmod(int(inside[0]), columns)
            here = slice(first, first + patches)
            assert np.array_equal(inside // columns - top, row[here])
            assert np.array_equal(inside % columns - left, column[here])
        start += number * patches


def test_windows_of_a_picture_of_720_rows_and_of_others():
    assert window_size(45, 80, (3, 3)) == (15, 27)
    assert Windows(45, 80, (3, 3), shifted=False).number == 9
    assert Windows(45, 80, (3, 3), shifted=True).number == 16
    # 4K: the same windows, and more of them; 512 x 512 pixels: four.
    assert window_size(135, 240, (3, 3)) == (15, 27)
    assert Windows(135, 240, (3, 3), shifted=False).number == 81
    assert Windows(32, 32, (3, 3), shifted=False).number == 4
    assert borders(10, 4, False) == [0, 4, 8, 10]
    assert borders(10, 4, True) == [0, 2, 6, 10]
    assert borders(10, 5, True) == [0, 2, 7, 10]
    assert borders(4, 4, True) == [0, 4]
    assert borders(3, 1, True) == [0, 1, 2, 3]


# ---- full size


def published_tensors(entry: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published file."""
    rows = json.loads((DATA / "names.json").read_text(encoding="utf-8"))[entry]
    return {
        name.replace("*", str(block)): tuple(shape)
        for name, shape, *where in rows
        for block in (range(where[0], where[1] + 1) if where else [None])
    }


@pytest.mark.parametrize("entry", FULL_SIZE)
def test_full_size(entry):
    """Names, shapes and counts of the published file, without memory for any of them."""
    config = CONFIGS[entry]
    module_class = CLASSES[entry.rpartition("/")[2]]
    before = mx.get_active_memory()
    module = module_class(module_class.config_class.from_dict(config))
    parameters = dict(tree_flatten(module.parameters()))
    expected = published_tensors(entry)
    buffers = {name for name in expected if name.endswith("rope.freqs")}
    assert len(buffers) == (0 if entry.endswith("vae") else config["num_layers"])
    taken = {name: shape for name, shape in expected.items() if name not in buffers}
    assert sum(map(prod, taken.values())) == FULL_SIZE[entry] == config["_parameters"]
    turns = layout_turns(module)
    as_loaded = {
        name: tuple(turns.get(name, lambda value: value)(mx.zeros(shape)).shape) for name, shape in taken.items()
    }
    assert {name: tuple(value.shape) for name, value in parameters.items()} == as_loaded
    assert match(module, parameters, expected, source="the file") == {name: name for name in taken}
    # Files without the tables load too.
    assert match(module, parameters, taken, source="the file") == {name: name for name in taken}
    assert mx.get_active_memory() - before < 10e6


def test_defaults_are_the_published_values():
    config_class = SeedVR2Transformer.config_class
    assert config_class() == config_class.from_dict(CONFIGS["SeedVR2-3B/transformer"])
    config_class = SeedVR2Autoencoder.config_class
    assert vars(config_class()) | {"decoder_layers_per_block": 3} == vars(
        config_class.from_dict(CONFIGS["SeedVR2/vae"])
    )


# ---- two tensors of the same shape are the mistake that strict loading cannot see


def unread(data: Data) -> re.Pattern[str]:
    """What becomes of the text in the last block reaches nothing."""
    last = data.config["num_layers"] - 1
    of_attention = r"attn\.(proj_out|norm_q)\.txt\."
    of_7b = r"|mlp\.txt\.|ada\.txt\.(attn_gate|mlp_)" if data.config["rope_type"] is None else ""
    return re.compile(rf"^blocks\.{last}\.({of_attention}{of_7b})")


# The autoencoder's pairs are many: in parts, which several processes can share.
PARTS = 8


@pytest.mark.parametrize(
    "name, part, parts",
    [(name, 0, 1) for name in TRANSFORMERS] + [("autoencoder", part, PARTS) for part in range(PARTS)],
)
def test_swapping_two_tensors_shows(name, part, parts):
    data = Data(name)
    module = data.module()
    if name in TRANSFORMERS:
        run = lambda: [predict(module, data, "small")]  # noqa: E731
        expected, idle = [data.outputs["small"]], unread(data)
    else:
        pixels, latents = data.inputs["pixels"][:1, :16, :24], data.inputs["latents"][:1, :3, :2]
        run = lambda: [encode(module, pixels), decode(module, latents)]  # noqa: E731
        expected, idle = run(), re.compile("^$")
        mx.eval(expected)
    tensors = dict(tree_flatten(module.parameters()))
    telling = [
        pair
        for pair in combinations([name for name in tensors if not idle.search(name)], 2)
        if tensors[pair[0]].shape == tensors[pair[1]].shape and not neutral(*pair)
    ]
    assert len(telling) > len(tensors) / 2
    unseen = []
    for first, second in telling[part::parts]:
        set_two(module, {first: tensors[second], second: tensors[first]})
        if all(relative_error(*pair) <= MARGIN * PARITY for pair in zip(run(), expected, strict=True)):
            unseen.append((first, second))
        set_two(module, {first: tensors[first], second: tensors[second]})
    assert not unseen, f"{len(unseen)} of {len(telling)} swaps go unnoticed"
    assert all(relative_error(*pair) <= PARITY for pair in zip(run(), expected, strict=True))


def neutral(first: str, second: str) -> bool:
    """Two biases that are added to the same sum; and keys', which change all scores of a query alike."""
    if first.endswith(".to_k.bias") and second.endswith(".to_k.bias"):
        return True
    return first.endswith(".conv2.bias") and second == first.replace(".conv2.", ".conv_shortcut.")


def set_two(module, values) -> None:
    for name, value in values.items():
        *path, leaf = name.split(".")
        holder = module
        for step in path:
            holder = holder[int(step)] if isinstance(holder, list) else holder[step]
        holder[leaf] = value


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_what_the_last_block_does_to_the_text_reaches_nothing(name):
    """Else the test above would leave out too much."""
    data = Data(name)
    module = data.module()
    idle = {key: 2 - value for key, value in tree_flatten(module.parameters()) if unread(data).search(key)}
    assert bool(idle) == (name != "transformer_3b")
    set_two(module, idle)
    assert relative_error(predict(module, data, "small"), data.outputs["small"]) <= PARITY


# ---- configurations


@pytest.mark.parametrize(
    "part, change, complaint",
    [
        ("transformer", {"txt_dim": 12}, "txt_dim"),
        ("transformer", {"emb_dim": 100}, "six times"),
        ("transformer", {"patch_size": [2, 2, 2]}, "frames"),
        ("transformer", {"rope_dim": 60}, "rope_dim"),
        ("transformer", {"rope_dim": 4}, "rope_dim"),
        ("transformer", {"mlp_type": "geglu"}, "mlp_type"),
        ("transformer", {"rope_type": "rope3d"}, "rope_type"),
        ("transformer", {"vid_out_norm": "layer"}, "vid_out_norm"),
        ("transformer", {"window": [4, 0, 3]}, "window"),
        ("vae", {"decoder_layers_per_block": 5}, "decoder_layers_per_block"),
        ("vae", {"down_block_types": ["DownEncoderBlock2D"] * 4}, "DownEncoderBlock3D"),
        ("vae", {"act_fn": "gelu"}, "act_fn"),
    ],
)
def test_what_is_not_built_is_refused(part, change, complaint):
    values = tiny_configs()[part]
    config_class = CLASSES[part].config_class
    config_class.from_dict(values)
    with pytest.raises(CheckpointError, match=complaint):
        config_class.from_dict(values | change)


# ---- where the weights lie


def names(shapes: dict[str, tuple[int, ...]]) -> Renamed:
    """Shapes without values."""
    return Renamed({name: mx.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("entry", FULL_SIZE)
def test_the_configuration_of_a_published_file_follows_from_its_shapes(entry):
    found = {"transformer": transformer_config, "vae": vae_config}[entry.rpartition("/")[2]](
        names(published_tensors(entry))
    )
    expected = {name: value for name, value in CONFIGS[entry].items() if not name.startswith("_")}
    assert {name: found[name] for name in expected if name in found} == {
        name: value for name, value in expected.items() if name in found
    }
    # What it leaves out nothing here reads.
    config_class = CLASSES[entry.rpartition("/")[2]].config_class
    assert config_class.from_dict(found) == config_class.from_dict(expected)


def write_published_files(folder: Path, *keys: str) -> Path:
    """Files as they are published, small, with the tables of frequencies."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"seedvr2-3b": Data("transformer_3b"), "seedvr2-7b": Data("transformer_7b")}
    for key in keys:
        assert any(name.endswith("rope.freqs") for name in data[key].weights)
        mx.save_safetensors(str(folder / TRANSFORMER_FILES[key]), data[key].weights)
    module = SeedVR2Autoencoder(SeedVR2Autoencoder.config_class.from_dict(tiny_configs()["vae"]))
    tensors = published(module, seed=3, dtype=mx.float16)
    # As published: three taps along time.
    tensors = {
        name: mx.stack([value / 2, value / 4, value / 4], axis=2) if value.ndim == 4 else value
        for name, value in tensors.items()
    }
    mx.save_safetensors(str(folder / VAE_FILE), tensors)
    return folder


def open_folder(root: Path, **options) -> PublishedFolder:
    return open_family_s(root, FAMILY, **options)


@pytest.mark.parametrize("key, name", [("seedvr2-3b", "transformer_3b"), ("seedvr2-7b", "transformer_7b")])
def test_published_files_need_no_configuration(tmp_path, key, name):
    folder = open_folder(write_published_files(tmp_path, key))
    assert key_of(folder) == key
    assert folder.has("transformer")
    assert folder.has("vae")
    data = Data(name)
    # What no shape tells is as published.
    config = folder.config("transformer")
    assert {entry: value for entry, value in data.config.items() if config[entry] != value}.keys() <= {"rope_dim"}
    module = load(folder, "transformer", config=config | {"rope_dim": data.config["rope_dim"]})
    assert relative_error(predict(module, data, "small"), data.outputs["small"]) <= PARITY
    pixels = mx.random.uniform(-1, 1, (1, 16, 24, 3), key=mx.random.key(1))
    assert encode(load(folder, "vae"), pixels).shape == (1, 2, 3, 4)


def load(folder, part: str, **options):
    options = {"config": folder.config(part), "dtype": mx.float32} | options
    return load_component(CLASSES[part], folder.root / part, tensors=folder.tensors(part), **options)


def test_of_both_transformers_the_models_name_tells(tmp_path):
    folder = open_folder(write_published_files(tmp_path, "seedvr2-3b", "seedvr2-7b"))
    assert key_of(folder) == "seedvr2-3b"
    folder = open_folder(tmp_path, overrides={"transformer": {"num_layers": 36}})
    assert key_of(folder) == "seedvr2-7b"


def test_a_folder_that_holds_something_else_is_refused_in_a_sentence(tmp_path):
    folder = open_folder(tmp_path)
    assert type(folder) is PublishedFolder
    assert not folder.has("transformer")
    with pytest.raises(CheckpointError, match=r"holds no transformer of SeedVR2: put seedvr2_ema_3b"):
        folder.config("transformer")
    with pytest.raises(CheckpointError, match=r"holds no vae of SeedVR2: put ema_vae"):
        folder.tensors("vae")
    mx.save_safetensors(str(tmp_path / TRANSFORMER_FILES["seedvr2-7b"]), {"a": mx.zeros(1)})
    with pytest.raises(CheckpointError, match=r"fp16\.safetensors holds no transformer of SeedVR2"):
        open_folder(tmp_path).config("transformer")


@pytest.mark.parametrize("part", CLASSES)
def test_one_component_in_a_file(tmp_path, monkeypatch, part):
    """All else comes from the model's own repository, and what the file holds is not fetched."""
    folder = write_published_files(tmp_path, "seedvr2-3b")
    names = {"transformer": TRANSFORMER_FILES["seedvr2-3b"], "vae": VAE_FILE}
    mine = (folder / names[part]).rename(tmp_path / "mine.safetensors")
    asked = []

    def resolve_model(name, patterns, *, required, alternatives):
        asked.append((name, required))
        return folder

    monkeypatch.setattr("mflux.models.seedvr2.layouts.resolve_model", resolve_model)
    model = SeedVR2(model_path=str(mine), model_config=ModelConfig.from_name("seedvr2-3b"))
    assert asked == [("numz/SeedVR2_comfyUI", [name for other, name in names.items() if other != part])]
    assert model.folder.files == {one: mine if one == part else folder / names[one] for one in names}
    assert isinstance(getattr(model, part), CLASSES[part])


@pytest.mark.parametrize("kind", ["3b", "7b"])
def test_folders_with_configurations(tmp_path, kind):
    folder = open_folder(write_tiny(tmp_path, kind=kind))
    assert key_of(folder) == f"seedvr2-{kind}"
    assert folder.scheduler() == {}
    assert folder.stored("transformer") is None
    module = load(folder, "transformer")
    latents = mx.random.normal((1, 6, 8, 9), key=mx.random.key(2))
    assert mx.isfinite(module(latents, text_embeds(), 1000)).all().item()


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("part", CLASSES)
def test_what_is_saved_computes_the_same(tmp_path, part, bits):
    folder = open_folder(write_tiny(tmp_path / "whole", wide=True))
    # The wide one's layers divide by 64 all but those that take pixels.
    module = load(folder, part, quantize=bits, dtype=None, keep_dtypes=True)
    save_component(module, tmp_path / "saved" / part, folder.config(part))
    saved = open_folder(tmp_path / "saved")
    assert (saved.stored(part).bits if bits else saved.stored(part)) == bits
    again = load(saved, part)
    if part == "transformer":
        latents = mx.random.normal((1, 6, 8, 9), key=mx.random.key(2))
        run = lambda module: module(latents, text_embeds(), 700)  # noqa: E731
    else:
        pixels = mx.random.uniform(-1, 1, (1, 16, 24, 3), key=mx.random.key(1))
        run = lambda module: decode(module, encode(module, pixels))  # noqa: E731
    assert relative_error(run(again), run(load(folder, part, quantize=bits))) <= 1e-6
    if bits:
        whole = run(load(folder, part))
        assert 1e-4 < relative_error(run(again), whole) < {4: 0.6, 8: 0.05}[bits]


@pytest.mark.skipif(has_gpu(), reason="where computation is float32")
def test_taps_along_time_are_added_before_anything_is_rounded():
    data = Data("autoencoder")
    kernel = data.weights["encoder.conv_in.weight"]
    assert kernel.dtype == mx.float16
    exact = np.array(kernel.astype(mx.float32)).sum(axis=2, dtype=np.float64)
    found = np.array(data.module().encoder.conv_in.weight).transpose(0, 3, 1, 2)
    assert np.abs(found - exact).max() < 1e-6
    assert np.abs(exact.astype(np.float16) - exact).max() > 1e-5


# ---- folders of mflux 0.24


def write_024(folder: Path, parts, *, bits: int | None = None) -> Path:
    """As mflux 0.24 saves it: its names, kernels as MLX has them, shared weights of the attention twice."""
    for part, (_, tensors) in parts.items():
        saved = {}
        for name, value in tensors.items():
            value = mx.moveaxis(value, 1, -1) if value.ndim == 5 else value
            block = re.match(r"blocks\.\d+\.", name)
            if part == "transformer" and block:
                name = name.replace(".rope.rope.freqs", ".rope.freqs")
                name = re.sub(r"\.ada\.(vid|txt|all)\.", r".ada.params_\1.", name)
                names = [re.sub(r"(\.attn\.\w+)\.(vid|txt)\.", r"\1_\2.", name)]
                if ".attn." in name and ".all." in name:
                    names = [name.replace(".all.", f"_{stream}.") for stream in ("vid", "txt")]
            else:
                names = [re.sub(r"^vid_out_ada\.", "", name)]
            for name in names:
                is_layer = name.endswith(".weight") and value.ndim == 2 and value.shape[-1] % 64 == 0
                if bits and is_layer:
                    stem = name.removesuffix("weight")
                    leaves = zip(("weight", "scales", "biases"), mx.quantize(value, 64, bits), strict=True)
                    saved |= {f"{stem}{leaf}": array for leaf, array in leaves}
                else:
                    saved[name] = value
        (folder / part).mkdir(parents=True)
        mx.save_safetensors(str(folder / part / "0.safetensors"), saved)
        weight_map = dict.fromkeys(saved, "0.safetensors")
        write_json(folder / part / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["3b", "7b"])
def test_folders_of_024(tmp_path, kind, bits):
    source = open_folder(write_tiny(tmp_path / "published", wide=True, kind=kind))
    parts = {}
    for part in CLASSES:
        tensors = dict(source.tensors(part))
        # As published: with an axis of time.
        parts[part] = (
            source.config(part),
            {name: value[:, :, None] if value.ndim == 4 else value for name, value in tensors.items()},
        )
    folder = open_folder(write_024(tmp_path / "old", parts, bits=bits))
    assert isinstance(folder, FolderOf024)
    assert key_of(folder) == f"seedvr2-{kind}"
    assert (folder.stored("transformer").bits if bits else folder.stored("transformer")) == bits
    # What the registry says in 0.24's words is not saved again.
    folder.overrides["transformer"] = {"num_layers": 36, "rope_on_text": False}
    assert "rope_on_text" not in folder.config("transformer")
    assert folder.lacking() == {}
    latents = mx.random.normal((1, 6, 8, 9), key=mx.random.key(2))
    pixels = mx.random.uniform(-1, 1, (1, 16, 24, 3), key=mx.random.key(1))
    runs = {
        "transformer": lambda module: module(latents, text_embeds(), 700),
        "vae": lambda module: decode(module, encode(module, pixels)),
    }
    for part, run in runs.items():
        old, new = load(folder, part), load(source, part, quantize=bits)
        assert relative_error(run(old), run(new)) <= 1e-6


def test_the_family_finds_its_parts(tmp_path):
    family = families()["seedvr2"]
    assert {part.name: part.module_class() for part in family.components} == CLASSES
    write_folder(tmp_path, whole_model())
    assert open_folder(tmp_path).config("transformer")["txt_in_dim"] == 5120

"""Z-Image's own: folders of 0.24, single files, ControlNets told apart, precisions, schedules, LoRAs, controls."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support.saved_024 import write_as_024
from support.small_depth_pro import write_model as write_depth_pro
from support.tiny import published, write_json

from families.z_image.cases import drawing, write_tiny
from mflux.backend import mx, tree_flatten
from mflux.checkpoints.loading import FolderTensors, load_component
from mflux.checkpoints.published import PublishedFolder
from mflux.checkpoints.renamed import Renamed, renamed
from mflux.errors import CheckpointError, NotBuiltError, UsageError
from mflux.models.common.config import ModelConfig
from mflux.models.common.model import open_folder
from mflux.models.common.networks.modulation import ModulationLinear
from mflux.models.z_image import ZImage, ZImageTurbo, ZImageTurboControlnet
from mflux.models.z_image.family import FAMILY
from mflux.models.z_image.latent_creator import ZImageLatentCreator
from mflux.models.z_image.layouts import (
    BASE_SHIFT,
    LAYOUT,
    TURBO_SHIFT,
    controlnet_config,
    static_schedule,
)
from mflux.models.z_image.model.controlnet import ZImageControlNet, ZImageControlNetConfig
from mflux.models.z_image.model.transformer import ZImageTransformer, ZImageTransformerConfig
from mflux.models.z_image.pipeline import limited
from mflux.models.z_image.variants.controlnet import ControlSpec, ControlType
from mflux.models.z_image.variants.controlnet import z_image_turbo_controlnet as controlled
from mflux.utils.metadata_reader import MetadataReader

CONFIGS = json.loads((Path(__file__).parents[2] / "data" / "surface" / "configs.json").read_text())
PROMPT = "a red circle"
SIZE = {"num_inference_steps": 2, "width": 48, "height": 32}
WORDS = ("--prompt", PROMPT, "--seed", 1, "--steps", 2, "--width", 48, "--height", 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("z-image") / "narrow")


@pytest.fixture(scope="module")
def with_controlnet(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("z-image") / "controlled", controlnet=True)


@pytest.fixture
def picture(tmp_path) -> Path:
    return drawing(80, 60, tmp_path / "drawing.png")


def z_image(folder: Path | str, name: str = "z-image-turbo", **options) -> ZImage:
    return ZImage(model_path=str(folder), model_config=ModelConfig.from_name(name), **options)


def drawn(pipeline: ZImage, **settings) -> np.ndarray:
    image = pipeline.generate_image(seed=1, prompt=PROMPT, **SIZE | settings).image
    return np.asarray(image).astype(int)


def pixels(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image).astype(int)


def settings_of(path: Path) -> dict:
    return MetadataReader.read_all_metadata(path)["exif"]


def flat(module) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


# ---- noise


def test_noise_is_0_24_s():
    drawn = mx.random.normal((16, 1, 4, 6), key=mx.random.key(7)).astype(mx.bfloat16).astype(mx.float32)
    assert mx.array_equal(ZImageLatentCreator.create_noise(7, 32, 48), drawn)
    unpacked = ZImageLatentCreator.unpack_latents(drawn, 32, 48)
    assert mx.array_equal(unpacked, drawn[:, 0][None])
    for latents in (unpacked, unpacked[:, :, None]):
        assert mx.array_equal(ZImageLatentCreator.pack_latents(latents, 32, 48), drawn)


def test_0_24_s_names():
    from mflux.models.z_image import variants

    assert ZImageTurbo is ZImage is variants.ZImageTurbo
    assert ControlSpec(type=ControlType.canny, image_path="a.png").strength == 1.0
    assert [kind.value for kind in ControlType] == ["pose", "canny", "hed", "depth", "mlsd"]


# ---- folders of mflux 0.24

# Ours → theirs.
NAMES_024 = {
    "transformer": (
        (r"^t_embedder\.mlp\.0\.", "t_embedder.linear1."),
        (r"^t_embedder\.mlp\.2\.", "t_embedder.linear2."),
        (r"^(all_final_layer\.2-1\.adaLN_modulation)\.1\.", r"\1.0."),
    ),
    "text_encoder": ((r"^model\.", ""),),
    "vae": (
        (r"^encoder\.(conv_in|conv_out)\.", r"encoder.\1.conv2d."),
        (r"^decoder\.(conv_in|conv_out)\.", r"decoder.\1.conv."),
        (r"\.conv_norm_out\.", ".conv_norm_out.norm."),
    ),
    "controlnet": (),
}
# What has no place in the files of 0.24 follows from shapes or is as published.
AS_PUBLISHED = {"vae": {"block_out_channels": [32, 32, 64, 64], "norm_num_groups": 32}}


def saved_by_024(source: Path, target: Path, bits: int | None = None) -> Path:
    return write_as_024(source, target, NAMES_024, bits=bits)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_folder_of_mflux_024(tmp_path, bits, monkeypatch):
    # 0.24 packed what modulates as well.
    monkeypatch.setattr(ModulationLinear, "read_late", False)
    source = write_tiny(tmp_path / "source", wide=True, changes=AS_PUBLISHED)
    old = saved_by_024(source, tmp_path / "old", bits)
    assert not (old / "transformer" / "config.json").exists()
    fresh, stored = z_image(source, quantize=bits), z_image(old)
    assert stored.bits == bits
    for part in ("text_encoder", "transformer", "vae"):
        one, other = flat(getattr(fresh, part)), flat(getattr(stored, part))
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert mx.array_equal(value, other[name]), (part, name)
    assert np.array_equal(drawn(fresh), drawn(stored))
    stored.save_model(str(tmp_path / "new"))
    assert json.loads((tmp_path / "new" / "model_index.json").read_text())["_class_name"] == "ZImagePipeline"
    assert np.array_equal(drawn(z_image(tmp_path / "new")), drawn(fresh))


def test_what_no_shape_of_it_tells_is_as_published(tmp_path):
    """At full size, from shapes alone."""
    from mflux.models.z_image.layouts import _text_encoder, _transformer
    from mflux.models.z_image.model.text_encoder import ZImageTextEncoder

    config = CONFIGS["Z-Image/transformer"]
    found = _transformer(Renamed(flat(ZImageTransformer(ZImageTransformerConfig.from_dict(config)))))
    assert {name: found[name] for name in config.keys() & found.keys()} == {
        name: config[name] for name in config.keys() & found.keys()
    }
    config = CONFIGS["Z-Image/text_encoder"]
    whole = ZImageTextEncoder.saved_class
    settings = whole.config_class.from_dict(config)
    assert whole.config_class.from_dict(_text_encoder(Renamed(flat(whole(settings))))) == settings


@pytest.mark.parametrize(("name", "shift"), [("z-image", BASE_SHIFT), ("z-image-turbo", TURBO_SHIFT)])
def test_its_schedule_is_that_of_the_model_it_is_taken_for(tmp_path, name, shift):
    source = write_tiny(tmp_path / "source", changes=AS_PUBLISHED, shift=shift)
    old = saved_by_024(source, tmp_path / "old")
    assert z_image(old, name).model_config.sigma_shift == shift
    settings = {"guidance": 0.0} if name == "z-image" else {}
    assert np.array_equal(drawn(z_image(old, name), **settings), drawn(z_image(source, name), **settings))


def test_a_controlnet_that_024_saved(tmp_path, picture):
    lite = {"controlnet": {"control_layers_places": [0, 14, 28], "control_refiner_layers_places": [0, 1]}}
    both = {"transformer": {"n_refiner_layers": 2}}
    lite["controlnet"]["n_refiner_layers"] = 2
    source = write_tiny(tmp_path / "source", controlnet=True, changes=AS_PUBLISHED | lite | both)
    old = saved_by_024(source, tmp_path / "old")
    assert np.array_equal(after(old, picture), after(source, picture))


# ---- single files


def original(tensors: dict[str, mx.array], prefix: str = "") -> dict[str, mx.array]:
    """With the authors' names: queries, keys and values in one matrix."""
    found = {}
    for name, value in tensors.items():
        name = name.replace("all_x_embedder.2-1.", "x_embedder.").replace("all_final_layer.2-1.", "final_layer.")
        name = name.replace(".norm_q.", ".q_norm.").replace(".norm_k.", ".k_norm.").replace(".to_out.0.", ".out.")
        if ".to_q." in name:
            stem = next(key for key in tensors if key == name)
            parts = [tensors[stem.replace(".to_q.", f".to_{part}.")] for part in "qkv"]
            name, value = name.replace(".to_q.", ".qkv."), mx.concatenate(parts)
        elif ".to_k." in name or ".to_v." in name:
            continue
        found[prefix + name] = value
    return found


def test_453_tensors_make_521():
    module = ZImageTransformer(ZImageTransformerConfig.from_dict(CONFIGS["Z-Image/transformer"]))
    parameters = flat(module)
    theirs = original(parameters)
    assert (len(theirs), len(parameters)) == (453, 521)
    names = LAYOUT.files["transformer"]
    tensors = renamed(theirs | {"norm_final.weight": mx.zeros(3840)}, names)
    assert names(parameters) is None
    assert {name: tensors[name].shape for name in tensors} == {name: value.shape for name, value in parameters.items()}


@pytest.fixture
def elsewhere(model, monkeypatch):
    """What else a single file's model consists of, as its repository would give it."""
    asked = []

    def resolve(name, components, beside, **_):
        asked.append((name, sorted(component.name for component in components)))
        return model

    monkeypatch.setattr("mflux.models.common.model.resolve", resolve)
    return asked


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_single_file(model, elsewhere, tmp_path, prefix):
    tensors = original(dict(FolderTensors(model / "transformer")), prefix)
    file = tmp_path / "z_image_turbo.safetensors"
    mx.save_safetensors(str(file), tensors | {f"{prefix}norm_final.weight": mx.ones(48)})
    pipeline, expected = z_image(file), z_image(model)
    assert elsewhere[0] == ("Tongyi-MAI/Z-Image-Turbo", ["text_encoder", "vae"])
    ours, theirs = flat(pipeline.transformer), flat(expected.transformer)
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(value, theirs[name]) for name, value in ours.items())
    assert np.array_equal(drawn(pipeline), drawn(expected))


def test_a_single_file_with_published_names_and_one_in_a_folder(model, elsewhere, tmp_path):
    (own,) = (model / "transformer").glob("*.safetensors")
    assert np.array_equal(drawn(z_image(own)), drawn(z_image(model)))
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    shutil.rmtree(copy / "transformer")
    (copy / "transformer").mkdir()
    tensors = original(dict(FolderTensors(model / "transformer")))
    mx.save_safetensors(str(copy / "transformer" / "diffusion_pytorch_model.safetensors"), tensors)
    assert np.array_equal(drawn(z_image(copy)), drawn(z_image(model)))


def test_a_single_file_through_the_command(cli, in_folder, model, elsewhere):
    mx.save_safetensors("mine.safetensors", original(dict(FolderTensors(model / "transformer"))))
    call = ("generate-z-image-turbo", *WORDS)
    single = cli(*call, "--model", "mine.safetensors", "--base-model", "z-image-turbo")
    assert single.status == 0, single.err
    whole = cli(*call, "--model", model, "--base-model", "z-image-turbo")
    assert np.array_equal(pixels(single.paths[0]), pixels(whole.paths[0]))
    saved = cli("save", "--model", "mine.safetensors", "--base-model", "z-image-turbo", "--path", "saved")
    assert saved.status == 0, saved.err
    again = cli(*call, "--model", "saved")
    assert again.status == 0, again.err
    assert np.array_equal(pixels(again.paths[0]), pixels(whole.paths[0]))


@pytest.mark.parametrize("content", [{"x": mx.zeros(3)}, {"x_embedder.weight": mx.zeros((3, 3))}], ids=["x", "part"])
def test_a_file_that_is_no_whole_transformer(elsewhere, tmp_path, content):
    file = tmp_path / "mine.safetensors"
    mx.save_safetensors(str(file), content)
    with pytest.raises(CheckpointError, match="mine.safetensors holds no transformer of Z-Image"):
        z_image(file)


# ---- ControlNets, told from their tensors


def full_size(**settings) -> dict[str, mx.array]:
    values = CONFIGS["Z-Image-Turbo-Fun-Controlnet-Union-2.1"] | settings
    return flat(ZImageControlNet(ZImageControlNetConfig.from_dict(values)))


BEFORE = "control_noise_refiner.0.before_proj.weight"
_1_0 = {
    "control_layers_places": [0, 5, 10, 15, 20, 25], "control_in_dim": 16, "add_control_noise_refiner": None,
}  # fmt: skip


def test_union_2_1_is_told_at_full_size():
    tensors = full_size()
    assert sum(value.size for value in tensors.values()) == 3_356_225_792
    tensors[BEFORE] = mx.zeros((4, 4)).at[3, 3].add(1e-6)
    expected = CONFIGS["Z-Image-Turbo-Fun-Controlnet-Union-2.1"]
    assert {"_parameters": expected["_parameters"]} | controlnet_config(Renamed(tensors)) == expected


def test_union_2_0_has_a_projection_that_nobody_trained_or_none():
    tensors = full_size()
    tensors[BEFORE] = mx.zeros((4, 4))
    untrained = controlnet_config(Renamed(tensors))
    del tensors[BEFORE]
    without = controlnet_config(Renamed(tensors))
    assert untrained == without
    assert untrained["add_control_noise_refiner"] == "control_layers"
    assert untrained["control_layers_places"] == list(range(0, 30, 2))


def test_union_1_0_and_the_lite_one_are_told_by_how_many_layers_they_have():
    found = controlnet_config(Renamed(full_size(**_1_0)))
    assert {name: found[name] for name in _1_0} == _1_0
    tensors = full_size(control_layers_places=[0, 14, 28])
    tensors[BEFORE] = mx.ones((4, 4))
    lite = controlnet_config(Renamed(tensors))
    assert (lite["control_layers_places"], lite["add_control_noise_refiner"]) == ([0, 14, 28], "control_noise_refiner")


def test_a_controlnet_of_another_number_of_layers():
    with pytest.raises(CheckpointError, match="this one has 4"):
        controlnet_config(Renamed(full_size(control_layers_places=[0, 1, 2, 3])))


SMALL = {"dim": 48, "n_heads": 3, "n_kv_heads": 3, "n_refiner_layers": 2}
VERSIONS = {
    "1.0": _1_0 | SMALL,
    "2.0": SMALL | {"add_control_noise_refiner": "control_layers"},
    "2.1": SMALL,
}


def controlnet_file(folder: Path, version: str, dim: int = SMALL["dim"]) -> Path:
    """As the authors publish it: one file, no configuration."""
    config = ZImageControlNetConfig.from_dict(VERSIONS[version] | {"dim": dim})
    tensors = published(ZImageControlNet(config), seed=8)
    if version == "2.0":
        rest = published(ZImageControlNet(ZImageControlNetConfig.from_dict(SMALL | {"dim": dim})), seed=9)
        tensors |= {name: value for name, value in rest.items() if name.startswith("control_noise_refiner.")}
        tensors[BEFORE] = mx.zeros((dim, dim))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "Z-Image-Turbo-Fun-Controlnet-Union-2.1.safetensors"
    mx.save_safetensors(str(file), tensors)
    return file


def after(folder: Path, picture: Path, quantize: int | None = None, **settings) -> np.ndarray:
    pipeline = ZImageTurboControlnet(model_path=str(folder), quantize=quantize)
    controls = [ControlSpec(ControlType.canny, picture)]
    image = pipeline.generate_image(seed=1, prompt=PROMPT, controls=controls, **SIZE | settings).image
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_file_of_the_repository_draws_what_a_folder_with_its_configuration_draws(
    tmp_path, monkeypatch, picture, version
):
    base = write_tiny(tmp_path / "base", changes={"transformer": {"n_refiner_layers": 2}})
    file = controlnet_file(tmp_path / "repository", version)
    asked = []
    monkeypatch.setattr(controlled, "fetch_file", lambda *what: asked.append(what) or file)
    found = after(base, picture)
    assert asked == [
        (
            "alibaba-pai/Z-Image-Turbo-Fun-Controlnet-Union-2.1",
            "Z-Image-Turbo-Fun-Controlnet-Union-2.1.safetensors",
            None,
        )
    ]
    # Configured, in the model's own folder: nothing is downloaded.
    own = tmp_path / "own"
    shutil.copytree(base, own)
    config = CONFIGS["Z-Image-Turbo-Fun-Controlnet-Union-2.1"] | VERSIONS[version]
    write_json(own / "controlnet" / "config.json", {"_class_name": "ZImageControlNetModel", **config})
    shutil.copy(file, own / "controlnet" / "diffusion_pytorch_model.safetensors")
    asked.clear()
    assert np.array_equal(after(own, picture), found)
    assert asked == []
    assert not np.array_equal(found, after(own, picture, controlnet_strength=0.0))


@pytest.mark.parametrize("bits", [None, 8])
def test_a_saved_model_takes_its_controlnet_along(tmp_path, monkeypatch, picture, cli, bits):
    base = write_tiny(tmp_path / "base", wide=True, changes={"transformer": {"n_refiner_layers": 2}})
    file = controlnet_file(tmp_path / "repository", "2.0", dim=192)
    monkeypatch.setattr(controlled, "fetch_file", lambda *_: file)
    call = ("save", "--model", base, "--base-model", "z-image-controlnet", "--path", tmp_path / "saved")
    result = cli(*call, *(("-q", bits) if bits else ()))
    assert result.status == 0, result.err
    config = json.loads((tmp_path / "saved" / "controlnet" / "config.json").read_text())
    assert config["add_control_noise_refiner"] == "control_layers"
    names = FolderTensors(tmp_path / "saved" / "controlnet")
    assert not any(name.startswith("control_noise_refiner.") for name in names)
    # Its embedder takes 132 values, which do not fall into groups of 64.
    assert "control_all_x_embedder.2-1.scales" not in names
    assert ("control_layers.0.attention.to_q.scales" in names) is (bits is not None)
    expected = after(base, picture, quantize=bits)
    monkeypatch.setattr(controlled, "fetch_file", None)
    assert np.array_equal(after(tmp_path / "saved", picture), expected)


def test_a_controlnet_folder_without_a_configuration(tmp_path, picture):
    """A published file that somebody put there."""
    base = write_tiny(tmp_path / "base", changes={"transformer": {"n_refiner_layers": 2}})
    controlnet_file(base / "controlnet", "2.1")
    assert not np.array_equal(after(base, picture), after(base, picture, controlnet_strength=0.0))


def test_what_is_no_controlnet(tmp_path):
    base = write_tiny(tmp_path / "base")
    (base / "controlnet").mkdir()
    mx.save_safetensors(str(base / "controlnet" / "a.safetensors"), {"x": mx.zeros(3)})
    with pytest.raises(CheckpointError, match="holds no controlnet of Z-Image"):
        ZImageTurboControlnet(model_path=str(base)).controlnet  # noqa: B018


def test_a_model_without_one_says_so(model):
    pipeline = ZImageTurboControlnet(model_path=str(model), model_config=ModelConfig.z_image_turbo())
    with pytest.raises(UsageError, match="comes without a ControlNet"):
        pipeline.controlnet  # noqa: B018


# ---- controls


def test_several_controls_add_up(with_controlnet, picture, tmp_path, monkeypatch):
    pipeline = ZImageTurboControlnet(model_path=str(with_controlnet))
    other = drawing(50, 90, tmp_path / "other.png")
    given: list = []
    predict = ZImageTransformer.__call__
    spy = lambda self, *a, hints, **more: given.append(hints) or predict(self, *a, hints=hints, **more)  # noqa: E731
    monkeypatch.setattr(ZImageTransformer, "__call__", spy)

    def hints(*controls: ControlSpec, strength: float = 1.0) -> dict[int, mx.array]:
        """What the transformer is given in the first step."""
        given.clear()
        pipeline.generate_image(seed=1, prompt=PROMPT, controls=controls, controlnet_strength=strength, **SIZE)
        assert len(given) == 2
        return given[0]

    one, two = ControlSpec(ControlType.canny, picture, 0.3), ControlSpec(ControlType.canny, other, 0.8)
    first, second, both = hints(one), hints(two), hints(one, two)
    assert sorted(both) == [0, 1]
    for place, hint in both.items():
        assert mx.allclose(hint, first[place] + second[place], atol=1e-5)
        assert not mx.allclose(first[place], second[place], atol=1e-2)
    # Both strengths are multiplied.
    half = hints(ControlSpec(ControlType.canny, picture, 0.6), strength=0.5)
    assert all(mx.allclose(half[place], first[place], atol=1e-6) for place in first)
    assert all(mx.all(hint == 0) for hint in hints(one, strength=0.0).values())


@pytest.fixture
def depth_pro(tmp_path_factory, monkeypatch) -> list:
    """A tiny Depth Pro in the place of the published one."""
    from mflux.models.common.controls.depth_pro import weights

    folder = write_depth_pro(tmp_path_factory.mktemp("depth") / "model")
    asked: list = []
    monkeypatch.setattr(weights, "locate", lambda path=None: asked.append(path) or folder)
    return asked


def test_depths_are_depth_pro_s(with_controlnet, picture, depth_pro):
    from mflux.models.common.controls.depth_pro.depth_pro import DepthPro

    image = controlled.control_image(ControlSpec(ControlType.depth, picture), 48, 32)
    assert depth_pro == [None]
    assert (image.mode, image.size) == ("RGB", (48, 32))
    # Of the picture at the size of the drawing.
    scaled = picture.with_name("scaled.png")
    with PIL.Image.open(picture) as whole:
        whole.convert("RGB").resize((48, 32), PIL.Image.Resampling.LANCZOS).save(scaled)
    expected = np.asarray(DepthPro().create_depth_map(scaled).depth_image)
    assert np.array_equal(np.asarray(image), np.repeat(expected[:, :, None], 3, axis=2))
    assert expected.std() > 3


def test_drawing_after_depths(cli, in_folder, with_controlnet, picture, depth_pro):
    call = ("generate-z-image-controlnet", "--model", with_controlnet, *WORDS)
    result = cli(*call, "--control", f"depth:{picture}:0.7", "--metadata")
    assert result.status == 0, result.err
    assert depth_pro == [None]
    edges = cli(*call, "--control", f"canny:{picture}:0.7", "--base-model", "z-image-turbo")
    assert edges.status == 0, edges.err
    assert not np.array_equal(pixels(result.paths[0]), pixels(edges.paths[0]))
    # The name of the picture, not where it lies.
    assert settings_of(result.paths[0])["controls"] == ["depth:drawing.png:0.7"]
    assert str(picture.parent) not in result.paths[0].with_suffix(".metadata.json").read_text()


@pytest.mark.parametrize("kind", ["pose", "hed", "mlsd"])
def test_controls_that_are_not_built(cli, in_folder, with_controlnet, picture, kind):
    result = cli("generate-z-image-controlnet", "--model", with_controlnet, *WORDS, "--control", f"{kind}:{picture}")
    assert result.status != 0
    assert result.errors == [f"error: the control {kind} is not built yet in this version: there are canny and depth"]
    assert list(in_folder.glob("image*.png")) == []
    pipeline = ZImageTurboControlnet(model_path=str(with_controlnet))
    with pytest.raises(NotBuiltError, match=kind):
        pipeline.generate_image(seed=1, prompt=PROMPT, controls=[ControlSpec(ControlType[kind], picture)])
    assert pipeline.loaded() == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("canny:a.png", ("canny", "a.png", 1.0)),
        ("canny:a.png:0.5", ("canny", "a.png", 0.5)),
        ("depth:C:\\a.png:-1", ("depth", "C:\\a.png", -1.0)),
        ("canny:a:b.png", ("canny", "a:b.png", 1.0)),
        ("canny:0.5", ("canny", "0.5", 1.0)),
        ("canny:a:2:0.25", ("canny", "a:2", 0.25)),
    ],
)
def test_what_a_control_says(text, expected):
    from mflux.models.z_image.cli.z_image_turbo_generate_controlnet import control

    found = control(text)
    assert (found.type, str(found.image_path), found.strength) == expected


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "--control"),
        (("--control", "sketch:a.png"), "none of"),
        (("--control", "canny"), "names no picture"),
        (("--control", "canny:a.png:nan"), "finite"),
        (("--control", "canny:none.png"), "none.png"),
    ],
)
def test_controls_that_are_refused(cli, in_folder, with_controlnet, words, told):
    result = cli("generate-z-image-controlnet", "--model", with_controlnet, *WORDS, *words)
    assert result.status in (1, 2)
    assert len(result.errors) == 1
    assert told in result.errors[0]
    assert list(in_folder.iterdir()) == []


# ---- schedules, and pictures of mflux 0.24


def sigmas(pipeline: ZImage, scheduler: str | None, steps: int = 4, **size) -> np.ndarray:
    config = pipeline.settings(
        seed=1, prompt="", num_inference_steps=steps, scheduler=scheduler, **{"width": 1024, "height": 1024} | size
    )
    return np.array(config.scheduler.sigmas)


def shifted(steps: int, by: float) -> np.ndarray:
    even = np.linspace(1, 1 / steps, steps)
    return np.append(by * even / (1 + (by - 1) * even), 0)


def test_the_published_schedule_and_0_24_s(tmp_path):
    turbo, base = (
        z_image(write_tiny(tmp_path / name, shift=shift), name)
        for name, shift in (("z-image-turbo", 3.0), ("z-image", 6.0))
    )
    # Static, whatever the size.
    for size in ({}, {"width": 512, "height": 256}):
        np.testing.assert_allclose(sigmas(turbo, None, **size), shifted(4, 3.0), rtol=1e-5)
        np.testing.assert_allclose(sigmas(base, None, **size), shifted(4, 6.0), rtol=1e-5)
    # By size, as 0.24 has them; the figures are of the families' facts.
    np.testing.assert_allclose(sigmas(turbo, "linear"), shifted(4, np.exp(1.15)), rtol=1e-5)
    half = sigmas(turbo, "linear", width=512, height=512)
    np.testing.assert_allclose(half, shifted(4, 1.88), rtol=2e-3)
    fitted = sigmas(base, "flow_match_euler_discrete", 50)
    np.testing.assert_allclose(fitted, shifted(50, 7.56), rtol=2e-3)


OLD = {
    "mflux_version": "0.24.0", "prompt": PROMPT, "seed": 1, "steps": 2, "width": 48, "height": 32, "guidance": None,
}  # fmt: skip


def replayed(cli, command: str, model: Path, settings: dict, *words) -> Path:
    write_json(Path("old.json"), settings)
    base = command.removeprefix("generate-")
    result = cli(command, "-C", "old.json", "--model", model, "--base-model", base, *words)
    assert result.status == 0, result.err
    return result.paths[0]


def test_a_picture_of_024_is_drawn_with_its_schedule(cli, in_folder, model):
    """0.24 wrote no schedule down: it follows from the command."""
    command = "generate-z-image-turbo"
    call = (command, "--model", model, "--base-model", "z-image-turbo", *WORDS)
    linear, plain = cli(*call, "--scheduler", "linear").paths[0], cli(*call).paths[0]
    assert not np.array_equal(pixels(linear), pixels(plain))
    assert np.array_equal(pixels(replayed(cli, command, model, OLD)), pixels(linear))
    # What is newer has the checkpoint's, unless its settings say another.
    new = OLD | {"mflux_version": "0.25.0"}
    assert np.array_equal(pixels(replayed(cli, command, model, new)), pixels(plain))
    assert np.array_equal(pixels(replayed(cli, command, model, new | {"scheduler": "linear"})), pixels(linear))
    # And what is said holds.
    fitted = cli(*call, "--scheduler", "flow_match_euler_discrete").paths[0]
    asked = replayed(cli, command, model, OLD, "--scheduler", "flow_match_euler_discrete")
    assert np.array_equal(pixels(asked), pixels(fitted))


def test_a_picture_drawn_with_a_schedule_that_was_said_says_so(cli, in_folder, model):
    call = ("generate-z-image-turbo", "--model", model, "--base-model", "z-image-turbo")
    first = cli(*call, *WORDS, "--scheduler", "linear").paths[0]
    assert settings_of(first)["scheduler"] == "linear"
    assert np.array_equal(pixels(cli(*call, "-C", first).paths[0]), pixels(first))
    plain = cli(*call, *WORDS).paths[0]
    assert "scheduler" not in settings_of(plain)


@pytest.mark.parametrize("guidance", [None, 0.0, 1.0, 3.0])
def test_a_picture_of_024_is_guided_as_it_was(cli, in_folder, model, guidance):
    """Above 1, and not where nothing was said."""
    command = "generate-z-image"
    old = replayed(cli, command, model, OLD | {"guidance": guidance})
    call = (command, "--model", model, "--base-model", "z-image", *WORDS, "--scheduler", "flow_match_euler_discrete")
    expected = cli(*call, "--guidance", 3 if guidance == 3 else 0).paths[0]
    assert np.array_equal(pixels(old), pixels(expected))
    said = replayed(cli, command, model, OLD | {"guidance": guidance}, "--guidance", 1)
    assert np.array_equal(pixels(said), pixels(cli(*call, "--guidance", 1).paths[0]))


# ---- guidance


def test_guidance_where_nothing_is_said(cli, in_folder, model):
    call = ("generate-z-image", "--model", model, "--base-model", "z-image", *WORDS)
    plain, four, none = (cli(*call, *more).paths[0] for more in ((), ("--guidance", 4), ("--guidance", 0)))
    assert np.array_equal(pixels(plain), pixels(four))
    assert not np.array_equal(pixels(plain), pixels(none))
    assert settings_of(plain)["guidance"] == 4.0
    turbo = ("generate-z-image-turbo", "--model", model, "--base-model", "z-image-turbo", *WORDS)
    plain, guided = cli(*turbo), cli(*turbo, "--guidance", 4, "--negative-prompt", "blue")
    assert np.array_equal(pixels(plain.paths[0]), pixels(guided.paths[0]))
    assert [line.split(" is ignored")[0] for line in guided.warnings] == [
        "warning: --guidance",
        "warning: --negative-prompt",
    ]


def test_a_limit_on_guidance():
    one = mx.full((1, 2, 1, 2), 1.0)
    assert mx.array_equal(limited(3 * one, one, 0.0), 3 * one)
    assert mx.allclose(limited(3 * one, one, 2.0), 2 * one)
    assert mx.array_equal(limited(3 * one, one, 4.0), 3 * one)


# ---- precisions


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory) -> Path:
    """On a GPU computed in it, which `sixteen_bits` does here."""
    return write_tiny(tmp_path_factory.mktemp("z-image") / "sixteen", dtype=mx.bfloat16)


@pytest.fixture
def sixteen_bits(monkeypatch):
    """Weights stay in the file's dtype, as on a GPU."""
    monkeypatch.setattr("mflux.checkpoints.loading.compute_dtype", lambda stored: stored)


def streams(pipeline: ZImage, monkeypatch, **settings) -> set:
    """The dtypes of what passes between the transformer's layers."""
    seen = set()
    kind = type(pipeline.transformer.layers[0])
    call = kind.__call__

    def watched(layer, x, *rest):
        seen.add(x.dtype)
        return call(layer, x, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", watched)
        pipeline.generate_image(seed=1, prompt=PROMPT, **SIZE | settings)
    return seen


def test_float32_is_of_what_passes_between_layers(in_bfloat16, sixteen_bits, monkeypatch):
    plain, whole = z_image(in_bfloat16), z_image(in_bfloat16, float32=True)
    assert streams(plain, monkeypatch) == {mx.bfloat16}
    assert streams(whole, monkeypatch) == {mx.float32}
    for pipeline in (plain, whole):
        assert {value.dtype for value in flat(pipeline.transformer).values()} == {mx.bfloat16}
    difference = np.abs(drawn(plain) - drawn(whole))
    assert 0 < difference.mean() < 4


def test_float16_is_of_attention_and_feed_forward(model):
    whole, half = z_image(model), z_image(model, compute_precision=mx.float16)
    difference = np.abs(drawn(whole) - drawn(half))
    assert 0 < difference.max() < 12
    inside = {name for name, value in flat(half.transformer).items() if value.dtype == mx.float16}
    assert inside
    expected = {name for name in flat(half.transformer) if ".attention." in name or ".feed_forward." in name}
    assert inside == expected
    for part in (half.text_encoder, half.vae):
        assert {value.dtype for value in flat(part).values()} == {mx.float32}


def test_what_would_overflow_in_float16_does_not(model):
    """Values are a quarter inside, and what gates let through a 32nd."""
    pipeline = z_image(model, compute_precision=mx.float16)
    layer = pipeline.transformer.layers[0].feed_forward
    x = mx.full((1, 3, 48), 300.0)
    weights = {name: value.astype(mx.float32) for name, value in flat(layer).items()}
    up, gate = x @ weights["w3.weight"].T, x @ weights["w1.weight"].T
    exact = (gate * mx.sigmoid(gate) * up) @ weights["w2.weight"].T
    out = layer(x)
    assert out.dtype == mx.float32
    # Neither what the gates let through nor the result has its place in float16, and both are here.
    assert mx.max(mx.abs(mx.sigmoid(gate) * gate * up)).item() > 2 * 65504
    assert mx.max(mx.abs(exact)).item() > 65504
    assert mx.max(mx.abs(out - exact)).item() < 0.01 * mx.max(mx.abs(exact)).item()


def test_a_whole_autoencoder_in_float32(in_bfloat16, sixteen_bits):
    pipeline = z_image(in_bfloat16)
    assert {value.dtype for value in flat(pipeline.vae).values()} == {mx.bfloat16}
    plain = drawn(pipeline)
    whole = z_image(in_bfloat16)
    whole.vae_full_precision = True
    assert {value.dtype for value in flat(whole.vae).values()} == {mx.float32}
    difference = np.abs(plain - drawn(whole))
    assert 0 < difference.mean() < 4


def test_precisions_are_noted_and_taken_again(cli, in_folder, model):
    call = ("generate-z-image-turbo", "--model", model, "--base-model", "z-image-turbo")
    words = ("--float32", "--compute-precision", "float16", "--vae-full-precision", "--metadata")
    first = cli(*call, *WORDS, *words)
    assert first.status == 0, first.err
    noted = {"float32": True, "compute_precision": "float16", "vae_full_precision": True}
    settings = settings_of(first.paths[0])
    assert {name: settings[name] for name in noted} == noted
    again = cli(*call, "-C", first.paths[0])
    assert again.status == 0, again.err
    settings = settings_of(again.paths[0])
    assert {name: settings[name] for name in noted} == noted
    assert np.array_equal(pixels(again.paths[0]), pixels(first.paths[0]))


def test_a_model_that_computes_in_float16_is_not_saved(model, tmp_path):
    with pytest.raises(UsageError, match="leave compute_precision out"):
        z_image(model, compute_precision=mx.float16).save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


# ---- memory


def test_float32_weights_are_halved_while_they_are_read(tmp_path):
    """Turbo is published in float32: 24.6 GB in the file, 12.3 in memory, and at no time both."""
    values = {
        "dim": 768, "n_heads": 6, "n_kv_heads": 6, "axes_dims": [32, 48, 48], "n_layers": 8, "n_refiner_layers": 1,
        "cap_feat_dim": 512,
    }  # fmt: skip
    module = ZImageTransformer(ZImageTransformerConfig.from_dict(values))
    write_json(tmp_path / "config.json", values)
    mx.save_safetensors(str(tmp_path / "diffusion_pytorch_model.safetensors"), published(module, seed=1))
    del module
    size = (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size > 250e6
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loaded = load_component(ZImageTransformer, tmp_path, dtype=mx.bfloat16)
    peak, held = mx.get_peak_memory() - before, mx.get_active_memory() - before
    assert {value.dtype for value in flat(loaded).values()} == {mx.bfloat16}
    assert abs(held - size / 2) < 0.02 * size
    # Two batches of what is being read, and what they become.
    assert peak < held + 3 * 32e6
    assert peak < 0.85 * size


def test_the_transformer_is_to_be_held_in_bfloat16(in_bfloat16, model, monkeypatch):
    """On a GPU, where nothing is computed in float32 unless a file holds it."""
    monkeypatch.setattr("mflux.models.common.model.has_gpu", lambda: True)
    pipeline = z_image(model)
    assert {value.dtype for value in flat(pipeline.transformer).values()} == {mx.bfloat16}
    assert {value.dtype for value in flat(pipeline.vae).values()} == {mx.float32}


# ---- LoRAs


def test_two_names_for_one_layer_are_both_told(model, tmp_path):
    path = tmp_path / "twice.safetensors"
    stems = {"diffusion_model.layers.0.attention.qkv": 144, "diffusion_model.layers.0.attention.to_q": 48}
    tensors = {}
    for stem, height in stems.items():
        tensors |= {f"{stem}.lora_A.weight": mx.ones((2, 48)), f"{stem}.lora_B.weight": mx.ones((height, 2))}
    mx.save_safetensors(str(path), tensors)
    with pytest.raises(CheckpointError) as failure:
        z_image(model, lora_paths=[str(path)])
    assert all(stem in str(failure.value) for stem in stems)
    assert "twice" in str(failure.value)


# ---- what is no model of this kind


def test_the_folder_s_layout_is_seen(model, tmp_path):
    assert type(open_folder(model, FAMILY)) is PublishedFolder
    assert open_folder(model, FAMILY).scheduler() == static_schedule(TURBO_SHIFT)

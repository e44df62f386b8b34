"""`mflux-save` and what it writes: a folder in the published layout that draws the same picture, or nothing at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny import published, write_checkpoint

from mflux.backend import mx, nn, tree_flatten
from mflux.checkpoints import saving
from mflux.checkpoints.loading import FolderTensors, load_component
from mflux.checkpoints.saving import new_folder, save_component
from mflux.errors import OutputError
from mflux.models.common import model as module
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.autoencoders.kl import AutoencoderKL
from mflux.models.flux.model.transformer import FluxTransformer
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.utils.metadata_reader import MetadataReader

PROMPT = "a red circle on a white background"
PARTS = ("text_encoder", "text_encoder_2", "transformer", "vae")


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A tiny FLUX.1 model whose rows mostly divide into groups of 64; stored in bfloat16, as published ones are."""
    folder = tmp_path_factory.mktemp("models") / "wide-schnell"
    return write_checkpoint(folder, seed=3, guidance=False, dtype=mx.bfloat16, wide=True)


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def draw(cli):
    """Draw a small picture and return its pixels; every call has a file of its own."""
    count = iter(range(100))

    def run(model: Path, *words) -> np.ndarray:
        output = f"{next(count)}.png"
        call = ["generate", "--model", model, "--prompt", PROMPT, "--seed", 3, "--steps", 2, "--output", output]
        result = cli(*call, "--width", 48, "--height", 32, *words)
        assert result.status == 0, result.err
        assert result.warnings == []
        return pixels(output)

    return run


# ---- the command


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_saved_folder_draws_the_same(cli, draw, in_folder, wide, bits):
    words = [] if bits is None else ["-q", bits]
    result = cli("save", "--model", wide, "--path", "out/mine", *words)
    assert (result.status, result.out) == (0, "out/mine\n"), result.err
    assert left_over(Path("out")) == ["mine"]
    # The name tells nothing: what it derives from stands in the folder.
    assert (draw(Path("out/mine")) == draw(wide, *words)).all()
    assert MetadataReader.read_exif_metadata("0.png")["quantize"] == bits
    whole = draw(wide)
    assert (draw(wide, *words) == whole).all() == (bits is None)


def test_what_is_in_the_folder(cli, in_folder, wide):
    assert cli("save", "--model", wide, "--path", "mine", "-q", 4).status == 0
    target = Path("mine")
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    source = sorted(str(path.relative_to(wide)) for path in wide.rglob("*") if path.is_file())
    assert files == sorted([*source, "mflux_model.json", *(f"{part}/model.safetensors.index.json" for part in PARTS)])
    for part in PARTS:
        before = json.loads((wide / part / "config.json").read_text())
        # The autoencoder of this model has no layer that is wide enough.
        noted = {} if part == "vae" else {"quantization": {"bits": 4, "group_size": 64}}
        assert json.loads((target / part / "config.json").read_text()) == before | noted
    record = json.loads((target / "mflux_model.json").read_text())
    size = sum((target / file).stat().st_size for file in files if file != "mflux_model.json")
    assert record.pop("created_at").endswith("Z")
    import mflux

    assert record == {
        "format_version": 1, "mflux_version": mflux.__version__, "model_name": "wide-schnell",
        "base_model": "schnell", "quantize": 4, "size_gb": round(size / 1e9, 2), "upstream": None, "loras": [],
    }  # fmt: skip
    # Half a megabyte that is mostly the autoencoder's; of the transformer what modulates, a quarter of it, stays whole.
    sizes = [(root / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size for root in (wide, target)]
    assert 0.27 < sizes[1] / sizes[0] < 0.55


def test_unquantized_tensors_come_back_as_they_were(cli, in_folder, wide):
    """dtype, shape, layout and bits of every tensor, kernels included."""
    assert cli("save", "--model", wide, "--path", "mine").status == 0
    for part in PARTS:
        before, after = FolderTensors(wide / part), FolderTensors(Path("mine") / part)
        assert before.keys() == after.keys()
        for name in before:
            assert after[name].dtype == mx.bfloat16
            assert mx.array_equal(before[name], after[name]).item(), name
    for name in ("tokenizer/vocab.json", "tokenizer_2/tokenizer.json", "scheduler/scheduler_config.json"):
        assert (Path("mine") / name).read_bytes() == (wide / name).read_bytes()


def test_a_quantized_folder_saved_again_stays_as_it_is(cli, in_folder, wide):
    assert cli("save", "--model", wide, "--path", "six", "-q", 6).status == 0
    result = cli("save", "--model", "six", "--path", "again", "-q", 4)
    assert result.status == 0
    assert result.warnings
    assert all("is stored in 6 bits: it stays so, not in 4" in line for line in result.warnings)
    for part in PARTS:
        before, after = FolderTensors(Path("six") / part), FolderTensors(Path("again") / part)
        assert before.keys() == after.keys()
        assert all(mx.array_equal(before[name], after[name]).item() for name in before)
    record = json.loads(Path("again/mflux_model.json").read_text())
    assert (record["quantize"], record["base_model"], record["model_name"]) == (6, "schnell", "six")


def test_the_record_of_mflux_0_24_tells_the_model_too(draw, in_folder, tiny_dev):
    shutil.copytree(tiny_dev, "mine")
    Path("mine/mflux_model.json").write_text(json.dumps({"model_name": "dev", "base_model": None}))
    draw(Path("mine"))
    assert MetadataReader.read_exif_metadata("0.png")["base_model"] == "black-forest-labs/FLUX.1-dev"


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"base_model": 3}', '{"base_model": "unheard-of"}'])
def test_a_record_that_tells_nothing(cli, in_folder, record):
    Path("mine").mkdir()
    Path("mine/mflux_model.json").write_text(record)
    result = cli("generate", "--model", "mine", "--prompt", "x")
    assert result.status == 2
    assert result.err.startswith("error: mine is no model: it holds mflux_model.json: give ")


# ---- where it goes


def test_the_folder_for_all_models(cli, in_folder, wide, monkeypatch):
    Path("models").mkdir()
    monkeypatch.setenv("MFLUX_MODELS_DIR", "models")
    assert cli("save", "--model", wide, "-q", 8).out == "models/wide-schnell-mflux-q8\n"
    # What an earlier save added to the name goes, and the stored bits are what counts.
    result = cli("save", "--model", "models/wide-schnell-mflux-q8")
    assert (result.status, result.errors) == (
        1,
        [
            "error: models/wide-schnell-mflux-q8 exists already and is not empty: name a folder that does not exist, "
            "or remove it"
        ],
    )
    assert cli("save", "--model", wide).out == "models/wide-schnell-mflux-bf16\n"
    assert left_over(Path("models")) == ["wide-schnell-mflux-bf16", "wide-schnell-mflux-q8"]


def test_names():
    from mflux.models.common.saved_model import folder_name

    assert folder_name("dev", None, 8) == "FLUX.1-dev-mflux-q8"
    assert folder_name("schnell", None, None) == "FLUX.1-schnell-mflux-bf16"
    assert folder_name("dev", "someone/My-Dev", 4) == "My-Dev-mflux-q4"
    assert folder_name("dev", "/nowhere/someone--My-Dev-mflux-q5-lora02/", 3) == "My-Dev-mflux-q3"


def test_a_folder_in_the_cache_goes_by_its_repository(tmp_path):
    from mflux.models.common.saved_model import folder_name, record

    snapshot = tmp_path / "models--someone--My-Dev" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    assert folder_name("dev", str(snapshot), 8) == "My-Dev-mflux-q8"
    saved = record(key="dev", source="someone/My-Dev", root=snapshot, bits=None, size=2_500_000_000)
    assert saved["upstream"] == {"repo_id": "someone/My-Dev", "revision": "0123"}
    assert (saved["model_name"], saved["size_gb"], saved["quantize"]) == ("someone/My-Dev", 2.5, None)
    assert record(key="dev", source=None, root=tmp_path, bits=8, size=0)["model_name"] == "dev"


# ---- what goes wrong


def test_what_is_refused(cli, in_folder, wide, monkeypatch):
    monkeypatch.delenv("MFLUX_MODELS_DIR", raising=False)
    Path("there").mkdir()
    Path("there", "mine").write_text("mine")
    Path("file").write_text("mine")
    path = ["--path", "new"]
    cases = [
        (["--path", "new"], 2, "the following arguments are required: --model/-m"),
        (["--model", wide], 2, "name the folder to write with --path, or set MFLUX_MODELS_DIR"),
        (
            ["--model", wide, "--path", "there"],
            1,
            "there exists already and is not empty: name a folder",
        ),
        (["--model", wide, "--path", "file"], 1, "file exists already"),
        (["--model", wide, "--path", "file/new"], 1, "cannot write file/new"),
        (["--model", wide, *path, "-q", "7"], 2, "invalid choice: 7"),
        (["--model", wide, *path, "--hf-symlink"], 2, "leave --hf-symlink out"),
        (["--model", wide, *path, "--hf-symlink", "me"], 2, "leave --hf-symlink out"),
        (["--model", "nowhere/schnell/x", *path, "--base-model", "schnell"], 1, "there is no folder"),
        (["--model", "qwen-image-2.1", *path], 2, "qwen-image-2.1 is not built yet in this version"),
        (["--model", "unheard-of", *path], 2, "the model 'unheard-of' is not known"),
    ]
    for words, status, message in cases:
        result = cli("save", *words)
        assert (result.status, result.out) == (status, ""), words
        assert message in result.err, words
        assert len(result.errors) == 1, words
    monkeypatch.setenv("MFLUX_MODELS_DIR", "file")
    assert "MFLUX_MODELS_DIR is file, which is not a folder" in cli("save", "--model", wide).err
    assert left_over(in_folder) == ["file", "there"]
    assert Path("file").read_text() == "mine"


def test_too_little_room_is_seen_before_anything_is_read(cli, in_folder, wide, monkeypatch):
    usage = type("Usage", (), {"free": 9_000_000})
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(module, "load_component", None)
    result = cli("save", "--model", wide, "--path", "a/b/new")
    assert result.status == 1
    assert "cannot write a/b/new: it needs about 11 MB and the disk has 9 MB left: make room" in result.err
    assert left_over(in_folder) == []


def test_the_estimate_is_near(wide, tmp_path):
    from mflux.checkpoints.quantization import Quantization

    for bits in (None, 4):
        target = tmp_path / str(bits)
        model = Flux1(bits, model_path=str(wide))
        model.save_model(str(target))
        for component in model.components:
            weights = sum(path.stat().st_size for path in (target / component.folder).glob("*.safetensors"))
            estimate = model._estimated_bytes(component, Quantization.asked(bits))
            # The rest is the header.
            assert 0 < weights - estimate < 0.25 * weights + 10_000


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "error: stopped"),
        (OSError(28, "No space left on device"), 1, "error: cannot write a/new: No space left on device"),
    ],
)
@pytest.mark.parametrize("when", [0, 2])
def test_a_save_that_breaks_off_leaves_nothing(cli, in_folder, wide, monkeypatch, error, status, message, when):
    real, calls = module.save_component, []

    def breaking(*arguments, **options):
        calls.append(arguments)
        if len(calls) > when:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(module, "save_component", breaking)
    result = cli("save", "--model", wide, "--path", "a/new")
    assert (result.status, result.out) == (status, "")
    assert result.err.splitlines()[-1] == message
    assert left_over(in_folder) == []


def test_a_damaged_source_leaves_nothing(cli, in_folder, wide):
    shutil.copytree(wide, "bad-schnell")
    tensors = mx.load(str(wide / "vae" / "diffusion_pytorch_model.safetensors"))
    tensors.pop("decoder.conv_in.bias")
    mx.save_safetensors("bad-schnell/vae/diffusion_pytorch_model.safetensors", tensors)
    result = cli("save", "--model", "bad-schnell", "--path", "new")
    assert result.status == 1
    assert "decoder.conv_in.bias" in result.err
    assert left_over(in_folder) == ["bad-schnell"]


# ---- the class


def test_components_are_saved_one_at_a_time(wide, tmp_path, monkeypatch):
    """Nothing that was loaded before stays in memory, and nothing that is saved."""
    from mflux.models.common.memory import is_loaded

    flux = Flux1(8, model_path=str(wide))
    flux.generate_image(3, PROMPT, 1, 16, 16)
    alive = []
    real = module.save_component

    def watching(component, *arguments, **options):
        alive.append([name for name in ("vae", "transformer", "t5_text_encoder") if is_loaded(flux, name)])
        return real(component, *arguments, **options)

    monkeypatch.setattr(module, "save_component", watching)
    flux.save_model(str(tmp_path / "new"))
    assert alive == [[]] * 4
    again = Flux1(model_path=str(tmp_path / "new"), model_config=flux.model_config)
    assert again.bits == 8
    one, other = (pipeline.generate_image(3, PROMPT, 2, 32, 48) for pipeline in (flux, again))
    assert (np.asarray(one.image) == np.asarray(other.image)).all()


# ---- components


class Kernels(nn.Module):
    """One of each layer that files lay out otherwise, and of another size along every axis."""

    config_class = ComponentConfig

    def __init__(self, config: ComponentConfig):
        super().__init__()
        self.one = nn.Conv1d(2, 3, 4)
        self.two = nn.Conv2d(2, 3, (4, 5))
        self.three = nn.Conv3d(2, 3, (4, 5, 6))
        self.back = nn.ConvTranspose2d(2, 3, (4, 5))
        self.linear = nn.Linear(64, 2)


def test_kernels_are_written_as_they_are_published(tmp_path):
    kernels = Kernels(ComponentConfig())
    mx.eval(kernels.parameters())
    save_component(kernels, tmp_path / "new", {"key": "value"})
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == {"key": "value"}
    tensors = FolderTensors(tmp_path / "new")
    assert tensors["one.weight"].shape == (3, 2, 4)
    assert tensors["two.weight"].shape == (3, 2, 4, 5)
    assert tensors["three.weight"].shape == (3, 2, 4, 5, 6)
    assert tensors["back.weight"].shape == (2, 3, 4, 5)
    again = dict(tree_flatten(load_component(Kernels, tmp_path / "new").parameters()))
    for name, value in tree_flatten(kernels.parameters()):
        assert mx.array_equal(value, again[name]).item(), name


def test_shards(wide, tmp_path):
    transformer = load_component(FluxTransformer, wide / "transformer", quantize=4, keep_dtypes=True)
    config = json.loads((wide / "transformer" / "config.json").read_text())
    written = save_component(transformer, tmp_path / "new", config, stem="weights", shard_bytes=50_000)
    index = json.loads((tmp_path / "new" / "weights.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files == [f"weights-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    assert left_over(tmp_path / "new") == [
        "config.json",
        "model.safetensors.index.json",
        *files,
        "weights.safetensors.index.json",
    ]
    assert (
        index["metadata"]["total_size"] == written == sum(v.nbytes for _, v in tree_flatten(transformer.parameters()))
    )
    for file in files:
        held = mx.load(str(tmp_path / "new" / file))
        assert sum(value.nbytes for value in held.values()) <= 50_000
        assert {name for name, where in index["weight_map"].items() if where == file} == held.keys()
    one = dict(tree_flatten(load_component(FluxTransformer, tmp_path / "new").parameters()))
    other = dict(tree_flatten(load_component(FluxTransformer, wide / "transformer", quantize=4).parameters()))
    assert one.keys() == other.keys()
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)


def test_an_entry_that_is_no_longer_true_goes(tiny_schnell, tmp_path):
    vae = load_component(AutoencoderKL, tiny_schnell / "vae", keep_dtypes=True)
    config = json.loads((tiny_schnell / "vae" / "config.json").read_text())
    save_component(vae, tmp_path / "new", config | {"quantization": {"bits": 4, "group_size": 64}})
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == config
    assert published(vae, seed=0).keys() == FolderTensors(tmp_path / "new").keys()


# ---- the folder


def test_a_folder_that_appears_meanwhile_is_not_touched(tmp_path):
    with pytest.raises(OutputError, match="exists already"), new_folder(tmp_path / "new") as folder:
        (folder / "ours").write_text("ours")
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "theirs").write_text("theirs")
    assert left_over(tmp_path) == ["new"]
    assert left_over(tmp_path / "new") == ["theirs"]


def test_what_others_put_into_a_new_parent_stays(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a" / "b" / "new"):
        (tmp_path / "a" / "theirs").write_text("theirs")
        raise ZeroDivisionError
    assert left_over(tmp_path) == ["a"]
    assert left_over(tmp_path / "a") == ["theirs"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"), new_folder(tmp_path / "new"):
        pass
    tmp_path.chmod(0o700)

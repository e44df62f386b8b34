"""FIBO's own: prompts that are JSON, words that are not, sizes, cut-outs, folders of mflux 0.24, LoRAs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support.images import mask, opened, photo
from support.saved_024 import write_as_024

from families.fibo.cases import EDIT_PROMPT, PROMPT, write_tiny
from mflux.backend import mx
from mflux.checkpoints.loading import load_component
from mflux.checkpoints.published import PublishedFolder
from mflux.cli import save
from mflux.errors import MissingExtraError, UsageError
from mflux.models.common.config import ModelConfig
from mflux.models.common.config.config import Config
from mflux.models.common.memory import LazyComponent, is_loaded
from mflux.models.common.model import open_folder
from mflux.models.common.pipeline import Pipeline
from mflux.models.common.schedulers import LinearScheduler
from mflux.models.common.sizes import MEGAPIXEL, nearest, shrunk
from mflux.models.common.tokenizers.prompt_tokenizers import whole_tokenizer
from mflux.models.fibo import prompts
from mflux.models.fibo.cli import fibo_edit, fibo_generate
from mflux.models.fibo.cli import options as words
from mflux.models.fibo.family import FAMILY
from mflux.models.fibo.model.autoencoder import FiboAutoencoder
from mflux.models.fibo.model.transformer import FiboTransformer
from mflux.models.fibo.sources import cut_out, source_picture
from mflux.models.fibo.variants.edit import FIBOEdit
from mflux.models.fibo.variants.txt2img.fibo import FIBO

SMALL = ("--steps", "2", "--width", "48", "--height", "32", "--seed", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    photo(64, 48).save("photo.png")
    mask(64, 48).save("mask.png")
    return tmp_path


def generate(model: Path, *more: str, base: str = "fibo", prompt: str | None = PROMPT) -> int:
    said = () if prompt is None else ("--prompt", prompt)
    return fibo_generate.main(["--model", str(model), "--base-model", base, *said, *SMALL, *more])


def edit(model: Path, *more: str, base: str = "fibo-edit", prompt: str | None = EDIT_PROMPT) -> int:
    said = () if prompt is None else ("--prompt", prompt)
    start = ["--model", str(model), "--base-model", base, "--image-path", "photo.png"]
    return fibo_edit.main([*start, *said, "--steps", "2", "--seed", "1", *more])


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(opened(path)).astype(int)


# ---- prompts


@pytest.mark.parametrize("text", ["a wall", '["a"]', '"a wall"', "2024", "{", "", "[" * 100_000])
def test_what_is_no_json_object_is_words(text):
    assert prompts.as_object(text) is None
    with pytest.raises(UsageError, match="JSON object"):
        prompts.check_prompt(text)
    with pytest.raises(UsageError, match="JSON object"):
        prompts.check_edit(text)


@pytest.mark.parametrize("said", ["", "  ", None, 3, ["Paint"]])
def test_an_edit_needs_an_instruction(said):
    with pytest.raises(UsageError, match="edit_instruction"):
        prompts.check_edit(json.dumps({"short_description": "x", "edit_instruction": said}))


def test_a_program_is_told_what_makes_json(model):
    with pytest.raises(UsageError, match="FiboVLM"):
        FIBO(model_path=str(model)).generate_image(1, "a wall", 2, 32, 32)
    with pytest.raises(UsageError, match="FiboVLM"):
        FIBOEdit(model_path=str(model)).generate_image(1, "paint it", "photo.png")


def test_the_tokens_of_an_empty_prompt(model):
    """The reference has the model's first token for it, and the tokenizer's own beginning before any other."""
    fibo = FIBO(model_path=str(model))
    (empty,) = fibo.encode_prompts("")
    assert [state.shape for state in empty] == [(1, 1, 32)] * 5
    expected = fibo.text_encoder(mx.array([[300]]))
    assert mx.array_equal(empty[-1], expected[-1])


def test_a_long_prompt_is_cut_behind_its_beginning(model):
    tokenizer = whole_tokenizer(model / "tokenizer")
    text = "a red wall " * 50
    ids = tokenizer.encode(text, max_length=10_000)
    assert ids[0] not in ids[1:]
    assert tokenizer.encode(text, max_length=20) == ids[:20]
    assert tokenizer.encode(text, max_length=10_000) == ids
    assert tokenizer.is_cut(text, max_length=20)
    assert not tokenizer.is_cut(text, max_length=len(ids))


# ---- words


def test_words_without_the_extra_are_refused_before_anything_is_loaded(here, monkeypatch, capsys):
    def missing():
        raise MissingExtraError('FIBO-VLM needs transformers: pip install "mflux[vlm]"')

    def never(*_, **__):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(words, "check_installed", missing)
    monkeypatch.setattr(Pipeline, "resolve_folder", never)
    assert fibo_generate.main(["--prompt", "a wall"]) == 1
    assert fibo_edit.main(["--prompt", "paint it", "--image-path", "photo.png"]) == 1
    assert capsys.readouterr().err.count("mflux[vlm]") == 2


class Vlm:
    """Stands in for FIBO-VLM; what it does must not be remembered by anyone."""

    asked: list = []
    decoder = LazyComponent(lambda self: None)

    def __init__(self, model_path, quantize):
        self.asked.append((model_path, quantize))
        self.decoder = "in memory"
        self.alive.append(self)

    alive: list = []
    on_text = None

    def generate(self, prompt, seed):
        self.asked.append((prompt, seed))
        return json.dumps({"short_description": prompt})

    def edit(self, image, edit_instruction, use_mask, seed):
        self.asked.append((image.getpixel((60, 2)), edit_instruction, use_mask, seed))
        return json.dumps({"edit_instruction": edit_instruction})


@pytest.fixture
def vlm(monkeypatch) -> type[Vlm]:
    pytest.importorskip("mflux.models.fibo.vlm.fibo_vlm")
    monkeypatch.setattr("mflux.models.fibo.vlm.fibo_vlm.FiboVLM", Vlm)
    monkeypatch.setattr(words, "check_installed", lambda: None)
    Vlm.asked, Vlm.alive = [], []
    return Vlm


def test_words_become_json(here, model, vlm, monkeypatch):
    loaded = FIBO.load

    def load(self, component, **options):
        assert not is_loaded(vlm.alive[-1], "decoder"), "two models at once"
        return loaded(self, component, **options)

    monkeypatch.setattr(FIBO, "load", load)
    assert generate(model, "--vlm-model", "somewhere", "--quantize", "8", prompt="a wall") == 0
    assert vlm.asked == [("somewhere", 8), ("a wall", 42)]
    assert json.loads(Path("image.json").read_text()) == {"short_description": "a wall"}


def test_words_that_change_between_pictures_are_asked_for_anew(here, model, vlm, monkeypatch):
    Path("words.txt").write_text("a wall")
    drawn = FIBO.generate_image
    held = []

    def generate_image(self, **settings):
        held.append(settings["prompt"])
        image = drawn(self, **settings)
        if len(held) == 2:
            Path("words.txt").write_text("a door")
        return image

    monkeypatch.setattr(FIBO, "generate_image", generate_image)
    assert generate(model, "--prompt-file", "words.txt", "--seed", "1", "2", "3", prompt=None) == 0
    assert [entry for entry in vlm.asked if entry[1] == 42] == [("a wall", 42), ("a door", 42)]
    assert [json.loads(prompt)["short_description"] for prompt in held] == ["a wall", "a wall", "a door"]


def test_an_edit_in_words_shows_the_mask(here, model, vlm):
    assert edit(model, "--mask-path", "mask.png", prompt="paint it") == 0
    assert vlm.asked[1] == ((128, 128, 128), "paint it", True, 42)
    assert edit(model, prompt="paint it") == 0
    assert vlm.asked[3][0] != (128, 128, 128)
    assert vlm.asked[3][2] is False


# ---- beside the picture


def test_the_prompt_lies_beside_the_picture(here, model):
    assert generate(model) == 0
    assert json.loads(Path("image.json").read_text()) == json.loads(PROMPT)
    assert "Zürich" in Path("image.json").read_text(encoding="utf-8")
    # Taken from that very file, it is not written again.
    before = Path("image.json").read_bytes()
    Path("image.png").unlink()
    assert generate(model, "--prompt-file", "image.json", prompt=None) == 0
    assert sorted(path.name for path in here.glob("image*")) == ["image.json", "image.png"]
    assert Path("image.json").read_bytes() == before


def test_another_file_of_that_name_stays(here, model):
    Path("image.json").write_text("mine")
    assert generate(model) == 0
    assert Path("image.json").read_text() == "mine"
    assert json.loads(Path("image_1.json").read_text()) == json.loads(PROMPT)


# ---- settings


def test_a_picture_is_made_again_from_its_settings(here, model):
    more = ("--negative-prompt", "blurry", "--guidance", "2.5", "--quantize", "8")
    assert generate(model, *more, "--output", "a.png") == 0
    again = ["-C", "a.png", "--model", str(model), "--base-model", "fibo", "--output", "b.png"]
    assert fibo_generate.main(again) == 0
    assert (pixels("a.png") == pixels("b.png")).all()
    assert generate(model, "--guidance", "2.5", "--quantize", "8", "--output", "c.png") == 0
    assert (pixels("a.png") != pixels("c.png")).any(), "the negative prompt says nothing"


def test_an_edit_is_made_again_from_its_settings(here, model):
    assert edit(model, "--mask-path", "mask.png", "--output", "a.png") == 0
    again = ["-C", "a.png", "--model", str(model), "--base-model", "fibo-edit", "--output", "b.png"]
    assert fibo_edit.main(again) == 0
    assert (pixels("a.png") == pixels("b.png")).all()
    assert edit(model, "--output", "c.png") == 0
    assert (pixels("a.png") != pixels("c.png")).any(), "the mask says nothing"


def test_fibo_lite_draws_without_guidance(here, model, capsys):
    assert generate(model, "--output", "a.png", base="fibo-lite") == 0
    assert "ignored" not in capsys.readouterr().err
    assert generate(model, "--guidance", "7", "--negative-prompt", "x", "--output", "b.png", base="fibo-lite") == 0
    said = capsys.readouterr().err
    assert "--guidance is ignored" in said
    assert "--negative-prompt is ignored" in said
    assert (pixels("a.png") == pixels("b.png")).all()
    assert generate(model, "--guidance", "1", "--output", "c.png") == 0
    assert (pixels("a.png") == pixels("c.png")).all()
    assert generate(model, "--output", "d.png") == 0
    assert (pixels("a.png") != pixels("d.png")).any()


@pytest.mark.parametrize("name", ["linear", "flow_match_euler_discrete"])
def test_both_schedules_of_the_past_are_the_checkpoints(model, name):
    fibo = FIBO(model_path=str(model))
    config = fibo.settings(seed=1, prompt=PROMPT, num_inference_steps=4, height=512, width=1024, scheduler=name)
    assert isinstance(config.scheduler, LinearScheduler)
    # exp(mu) / (exp(mu) + 1 / sigma - 1) with mu = 0.5 + 0.65 / 3840 · (2048 - 256), from 1 to 1/4.
    mu = 0.5 + 0.65 / 3840 * (2048 - 256)
    expected = [np.exp(mu) / (np.exp(mu) + 1 / sigma - 1) for sigma in (1, 0.75, 0.5, 0.25)] + [0]
    np.testing.assert_allclose(np.array(config.scheduler.sigmas), expected, rtol=1e-6)


# ---- pictures to edit


@pytest.mark.parametrize(
    "size, seen",
    [
        ((64, 48), (64, 48)),
        ((70, 121), (64, 128)),
        ((5, 7), (16, 16)),
        ((4000, 3000), (1184, 880)),
        ((72, 88), (64, 96)),
    ],
)
def test_the_size_at_which_a_picture_is_seen(size, seen):
    """As the reference rounds: to the nearest multiple of 16, halves to even ones, down to a megapixel."""
    assert shrunk(size, MEGAPIXEL, nearest(16)) == seen


def test_a_mask_of_another_size_is_refused(here, model, capsys):
    mask(48, 64).save("mask.png")
    assert edit(model, "--mask-path", "mask.png") == 2
    assert "48 x 64" in capsys.readouterr().err


def test_grey_where_the_mask_is_white(here):
    masked = source_picture("photo.png", "mask.png")
    assert masked.getpixel((60, 2)) == (128, 128, 128)
    assert masked.getpixel((2, 40)) == opened("photo.png").getpixel((2, 40))


@pytest.mark.parametrize("more, size", [((), (64, 48)), (("--width", "32", "--height", "80"), (32, 80))])
def test_the_size_of_an_edit(here, model, more, size):
    assert edit(model, *more) == 0
    assert opened("image.png").size == size
    settings = Config(ModelConfig.fibo_edit(), height=size[1], width=size[0])
    assert (settings.width, settings.height) == size


def test_a_cut_out(here, model):
    photo(70, 50).save("photo.png")
    assert edit(model, "--matte-output", "matte_{seed}.png", base="fibo-edit-rmbg", prompt=None) == 0
    cut, matte = opened("image.png"), opened("matte_1.png")
    assert (cut.mode, cut.size, matte.mode, matte.size) == ("RGBA", (70, 50), "RGB", (64, 48))
    assert (np.asarray(cut)[..., :3] == np.asarray(opened("photo.png"))).all()
    expected = matte.convert("L").resize((70, 50), PIL.Image.Resampling.LANCZOS)
    assert (np.asarray(cut)[..., 3] == np.asarray(expected)).all()
    assert list(here.glob("*.json")) == []


def test_what_was_transparent_is_not_white_in_a_cut_out(here):
    PIL.Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save("clear.png")
    assert cut_out("clear.png", PIL.Image.new("RGB", (2, 2), "white")).getpixel((1, 1)) == (10, 20, 30, 255)


@pytest.mark.parametrize(
    "more, base, sentence",
    [
        (("--matte-output", "m.png"), "fibo-edit", "--matte-output goes with"),
        (("--output", "a.jpg"), "fibo-edit-rmbg", "transparency"),
        (("--matte-output", "m.txt"), "fibo-edit-rmbg", "m.txt"),
    ],
)
def test_cut_outs_that_cannot_be(here, model, capsys, more, base, sentence):
    assert edit(model, *more, base=base) == 2
    assert sentence in capsys.readouterr().err


def test_an_edit_needs_a_picture(here, model, capsys):
    assert fibo_edit.main(["--prompt", EDIT_PROMPT]) == 2
    assert "--image-path" in capsys.readouterr().err


# ---- folders


@pytest.mark.parametrize("bits", [None, 8])
def test_saved_and_drawn_with_again(here, tmp_path, bits):
    source = write_tiny(tmp_path / "wide", wide=True)
    quantize = [] if bits is None else ["--quantize", str(bits)]
    target = tmp_path / "saved"
    assert save.main(["--model", str(source), "--base-model", "fibo", "--path", str(target), *quantize]) == 0
    assert generate(source, *quantize, "--output", "a.png") == 0
    assert generate(target, "--output", "b.png") == 0
    assert (pixels("a.png") == pixels("b.png")).all()
    assert generate(source, "--output", "c.png") == 0
    assert (pixels("a.png") == pixels("c.png")).all() == (bits is None)


# Ours → theirs.
NAMES_024 = {
    "text_encoder": ((r"^model\.", ""),),
    "transformer": (),
    "vae": (
        (r"(?<=\.)(conv_in|conv_out|conv1|conv2|conv_shortcut|time_conv)\.", r"\1.conv3d."),
        (r"^(post_)?quant_conv\.", r"\1quant_conv.conv3d."),
        (r"\.resample\.1\.", ".resample_conv."),
        (r"\.gamma$", ".weight"),
    ),
}


def saved_by_024(source: Path, target: Path) -> Path:
    """With the encoder's convolutions over time, which no image needs."""
    width = json.loads((source / "vae" / "config.json").read_text())["base_dim"] * 2
    more = {}
    for level in (1, 2):
        stem = f"encoder.down_blocks.{level}.downsampler.time_conv.conv3d"
        more |= {f"{stem}.weight": mx.zeros((width, 3, 1, 1, width)), f"{stem}.bias": mx.zeros(width)}
    return write_as_024(source, target, NAMES_024, more={"vae": more})


def test_a_folder_that_024_saved(here, tmp_path):
    model = write_tiny(tmp_path / "new", vocabulary=(128_256, 128_000))
    old = saved_by_024(model, tmp_path / "old")
    folder = open_folder(old, FAMILY)
    assert type(open_folder(model, FAMILY)) is PublishedFolder
    assert folder.config("vae")["temperal_downsample"] == [False, True, True]
    published = PublishedFolder(model)
    for part, kind in (("transformer", FiboTransformer), ("vae", FiboAutoencoder)):
        said = kind.config_class.from_dict(folder.config(part))
        assert said == kind.config_class.from_dict(published.config(part))
    one, other = (
        load_component(FiboAutoencoder, root.root / "vae", config=root.config("vae"), tensors=root.tensors("vae"))
        for root in (published, folder)
    )
    assert mx.array_equal(one.encode(mx.ones((1, 3, 32, 16))), other.encode(mx.ones((1, 3, 32, 16))))
    assert generate(model, "--output", "a.png") == 0
    assert generate(old, "--output", "b.png") == 0
    assert (pixels("a.png") == pixels("b.png")).all()


# ---- LoRAs


@pytest.mark.parametrize(
    "name",
    [
        "transformer.single_transformer_blocks.1.attn.to_q.lora_{}.weight",
        "lora_transformer_single_transformer_blocks_1_attn_to_q.lora_{}.weight",
    ],
)
def test_a_lora_changes_the_layer_that_it_names(tmp_path, model, name):
    random = np.random.default_rng(1)
    width = 64
    down = random.standard_normal((2, width)).astype(np.float32)
    up = random.standard_normal((width, 2)).astype(np.float32)
    parts = ("A", "B") if "transformer." in name else ("down", "up")
    path = tmp_path / "style.safetensors"
    mx.save_safetensors(
        str(path), {name.format(part): mx.array(value) for part, value in zip(parts, (down, up), strict=True)}
    )
    plain = FIBO(model_path=str(model)).transformer.single_transformer_blocks[1].attn.to_q.weight
    fibo = FIBO(model_path=str(model), lora_paths=[str(path)], lora_scales=[0.5])
    changed = fibo.transformer.single_transformer_blocks[1].attn.to_q.weight
    np.testing.assert_allclose(np.array(changed - plain), 0.5 * up @ down, rtol=1e-4, atol=1e-5)


# ---- helpers of mflux 0.24


def test_helpers_of_024(here):
    from mflux.models.fibo.vlm.util import FiboVLMUtil

    FiboVLMUtil.save_json_prompt(Path("new/prompt.json"), PROMPT)
    assert json.loads(FiboVLMUtil.get_structured_prompt(Path("new/prompt.json"))) == json.loads(PROMPT)
    with pytest.raises(UsageError, match="not a JSON object"):
        FiboVLMUtil.save_json_prompt(Path("other.json"), "a wall")
    assert FiboVLMUtil.load_image(Path("photo.png")).mode == "RGB"

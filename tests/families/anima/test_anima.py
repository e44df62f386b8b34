"""Anima's own: steps, prompts, its repository's files, folders of mflux 0.24, LoRAs, and what its command refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support.saved_024 import write_as_024
from support.tiny import write_json

from families.anima.cases import write_tiny
from mflux.backend import mx, tree_flatten
from mflux.checkpoints.loading import FolderTensors, layout_turns
from mflux.errors import CheckpointError, UsageError
from mflux.models.anima import pipeline as anima_pipeline
from mflux.models.anima.latent_creator.anima_latent_creator import AnimaLatentCreator
from mflux.models.anima.layouts import split_files
from mflux.models.anima.variants.txt2img.anima import Anima
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.autoencoders.wan import AutoencoderWan
from mflux.models.common.networks.modulation import ModulationLinear

SIZE = {"num_inference_steps": 3, "width": 48, "height": 32}
PROMPT = "1girl, red_circle"
# What no shape tells is as published.
AS_PUBLISHED = {
    "text_encoder": {"rms_norm_eps": 1e-6, "rope_theta": 1_000_000},
    "text_conditioner": {"min_sequence_length": 512},
    "vae": {"base_dim": 8, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("anima") / "model")


def anima(folder: Path, name: str = "anima-turbo", **options) -> Anima:
    return Anima(model_path=str(folder), model_config=ModelConfig.from_name(name), **options)


def generated(pipeline, seed: int = 1, **settings) -> np.ndarray:
    return np.asarray(pipeline.generate_image(seed=seed, prompt=PROMPT, **SIZE | settings).image).astype(int)


def pixels(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image).astype(int)


# ---- noise, steps, guidance


def test_noise_is_0_24_s():
    noise = AnimaLatentCreator.create_noise(7, 32, 48)
    assert mx.array_equal(noise, mx.random.normal((1, 16, 4, 6), key=mx.random.key(7)))


@pytest.mark.parametrize(
    ("name", "steps", "guidance"), [("anima-turbo", 10, 1.0), ("anima-aesthetic", 30, 4.0), ("anima-base", 30, 4.0)]
)
def test_what_is_taken_where_nothing_is_said(model, name, steps, guidance):
    image = anima(model, name).generate_image(seed=1, prompt=PROMPT, width=16, height=16)
    assert (image.steps, image.guidance) == (steps, guidance)
    assert image.generation_parameters["scheduler"] == "er_sde"


@pytest.mark.parametrize("steps", [1, 3, 10, 30, 1000])
def test_noise_levels_are_picked_from_a_thousand(model, steps):
    config = anima(model).settings(
        seed=1, prompt=PROMPT, num_inference_steps=steps, width=32, height=32, scheduler="euler"
    )
    levels = np.array([(1000 - int(number * (1000 / steps))) / 1000 for number in range(steps)] + [0])
    assert np.allclose(config.scheduler.sigmas, 3 * levels / (1 + 2 * levels), atol=1e-6)


def test_more_steps_than_levels_are_refused(model):
    with pytest.raises(UsageError, match="1001: this model has 1000 noise levels"):
        generated(anima(model), num_inference_steps=1001)


def test_schedulers(model):
    pipeline = anima(model)
    plain = generated(pipeline)
    for same in ("er_sde", "linear"):
        assert np.array_equal(generated(pipeline, scheduler=same), plain)
    assert not np.array_equal(generated(pipeline, scheduler="euler"), plain)
    # Noise is added, and is the seed's.
    assert np.array_equal(generated(pipeline), plain)


def test_a_negative_prompt_is_encoded_where_there_is_guidance(model, caplog):
    base = anima(model, "anima-base")
    plain = generated(base)
    assert not np.array_equal(generated(base, negative_prompt="blue"), plain)
    assert np.array_equal(generated(base, negative_prompt=""), plain)
    assert caplog.messages == []
    turbo = anima(model)
    assert np.array_equal(generated(turbo, negative_prompt="blue"), generated(turbo))
    assert any("negative prompt is ignored" in line for line in caplog.messages)


# ---- prompts


def test_an_empty_prompt_is_one_token(model):
    pipeline = anima(model)
    words, queries = pipeline.ids_of("")
    assert list(words) == [pipeline.tokenizers["qwen3"].pad]
    assert len(queries) == 1
    (embeds,) = pipeline.encode_prompts("")
    assert np.array(embeds)[0, 1:].any() == np.False_ and np.array(embeds)[0, 0].any()


def test_a_long_prompt_is_cut_where_mflux_024_cut_it(model, caplog):
    pipeline = anima(model)
    text = "a b " * 400
    (embeds,) = pipeline.encode_prompts(text)
    assert embeds.shape[1] == len(pipeline.ids_of(text)[1]) > 512
    assert caplog.messages == []
    words, queries = pipeline.ids_of("a b " * 3000)
    assert len(words) == len(queries) == 4096 and queries[-1] == pipeline.ids_of("")[1][-1]
    assert "4096 tokens" in caplog.text


# ---- the repository's own files


def single_file_names(conditioner: dict, transformer: dict, prefix: str) -> dict[str, mx.array]:
    """The authors' names of both."""
    found = {f"{prefix}llm_adapter.{name}": value for name, value in conditioner.items()}
    for name, value in transformer.items():
        for number, part in enumerate(("self_attn", "cross_attn", "mlp"), start=1):
            name = name.replace(f".norm{number}.linear_", f".adaln_modulation_{part}.")
        for ours, theirs in (
            ("transformer_blocks.", "blocks."), (".attn1.", ".self_attn."), (".attn2.", ".cross_attn."),
            (".to_out.0.", ".output_proj."), (".to_q.", ".q_proj."), (".to_k.", ".k_proj."), (".to_v.", ".v_proj."),
            (".norm_q.", ".q_norm."), (".norm_k.", ".k_norm."), (".ff.net.0.proj.", ".mlp.layer1."),
            (".ff.net.2.", ".mlp.layer2."), ("patch_embed.proj.", "x_embedder.proj.1."),
            ("time_embed.t_embedder.", "t_embedder.1."), ("time_embed.norm.", "t_embedding_norm."),
            ("norm_out.linear_", "final_layer.adaln_modulation."), ("proj_out.", "final_layer.linear."),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        found[prefix + name] = value
    return found


_WAN = (
    (r"^quant_conv\.", "conv1."), (r"^post_quant_conv\.", "conv2."), (r"coder\.conv_in\.", "coder.conv1."),
    (r"\.norm_out\.", ".head.0."), (r"\.conv_out\.", ".head.2."), (r"^encoder\.down_blocks\.", "encoder.downsamples."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."), (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."), (r"\.conv_shortcut\.", ".shortcut."), (r"\.norm1\.", ".residual.0."),
    (r"\.conv1\.(?=weight|bias)(?<!coder\.conv1\.)", ".residual.2."), (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
)  # fmt: skip


def wan(name: str) -> str:
    for ours, theirs in (("norm1", "residual.0"), ("conv1", "residual.2"), ("norm2", "residual.3"),
                         ("conv2", "residual.6")):  # fmt: skip
        name = name.replace(f".{ours}.", f".{theirs}.")
    for pattern, new in _WAN[:10]:
        name = re.sub(pattern, new, name)
    found = re.match(r"decoder\.up_blocks\.(\d)\.(resnets\.(\d)|upsamplers\.0)\.(.*)", name)
    return name if found is None else f"decoder.upsamples.{4 * int(found[1]) + int(found[3] or 3)}.{found[4]}"


def write_split(source: Path, target: Path, prefix: str = "model.diffusion_model.") -> Path:
    """A model as its own repository has it, for Turbo; with other weights for the base."""
    parts = {part: dict(FolderTensors(source / part)) for part in
             ("text_encoder", "text_conditioner", "transformer", "vae")}  # fmt: skip
    transformer = single_file_names(parts["text_conditioner"], parts["transformer"], prefix)
    files = {
        "anima-turbo": transformer,
        "anima-base": {name: -value if name.endswith("final_layer.linear.weight") else value
                       for name, value in transformer.items()},
    }  # fmt: skip
    for key, tensors in files.items():
        path = target / split_files(key)["transformer"]
        path.parent.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(path), tensors)
    others = {
        "text_encoder": parts["text_encoder"],
        # Layers of more frames, which no image needs.
        "vae": {wan(name): value for name, value in parts["vae"].items()}
        | {"decoder.upsamples.3.time_conv.weight": mx.zeros((2, 2, 3, 1, 1))},
    }
    for part, tensors in others.items():
        path = target / split_files("anima-turbo")[part]
        path.parent.mkdir(parents=True)
        mx.save_safetensors(str(path), tensors)
    return target


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The tokenizers' own repositories, in place of what would be downloaded; which were asked for."""
    source = write_tiny(tmp_path / "source", changes=AS_PUBLISHED)
    asked = []

    def resolve(name, patterns, *, required=(), alternatives=()):
        asked.append(name)
        return source / {"Qwen/Qwen3-0.6B-Base": "tokenizer", "google/t5-v1_1-xxl": "t5_tokenizer"}[name]

    monkeypatch.setattr(anima_pipeline, "resolve_model", resolve)
    return source, asked


@pytest.fixture
def all_at_once(monkeypatch):
    """Modulation is loaded with the rest, so that every weight can be looked at."""
    monkeypatch.setattr(ModulationLinear, "read_late", False)


def same_weights(one: Anima, other: Anima) -> None:
    for part in ("text_encoder", "text_conditioner", "transformer", "vae"):
        ours, theirs = (dict(tree_flatten(getattr(each, part).parameters())) for each in (one, other))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert mx.array_equal(value, theirs[name]), (part, name)


@pytest.mark.usefixtures("all_at_once")
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "net.", ""])
def test_the_repository_s_own_files(tmp_path, elsewhere, prefix):
    source, asked = elsewhere
    folder = write_split(source, tmp_path / "Anima", prefix)
    split, plain = anima(folder), anima(source)
    same_weights(split, plain)
    assert np.array_equal(generated(split), generated(plain))
    assert asked == ["Qwen/Qwen3-0.6B-Base", "google/t5-v1_1-xxl"]
    # Another of the three is another file.
    assert not np.array_equal(generated(anima(folder, "anima-base"), guidance=1.0), generated(plain))
    with pytest.raises(CheckpointError):
        anima(folder, "anima-aesthetic")
    split.save_model(str(tmp_path / "saved"))
    asked.clear()
    assert np.array_equal(generated(anima(tmp_path / "saved")), generated(plain))
    assert asked == [], "the tokenizers were saved with it"


def test_one_file(tmp_path, elsewhere, monkeypatch):
    """What trainers write: the transformer with its conditioner; all else comes from the model's repository."""
    source, _ = elsewhere
    folder = write_split(source, tmp_path / "Anima")
    file = folder / split_files("anima-base")["transformer"]
    monkeypatch.setattr("mflux.models.common.model.resolve", lambda *_, **__: source)
    one = anima(file, "anima-base")
    assert mx.array_equal(one.transformer.proj_out.weight, -anima(source).transformer.proj_out.weight)


def test_an_image_says_which_of_the_three_it_is(cli, in_folder, model):
    call = ("generate-anima", "--model", model, "--prompt", PROMPT, "--steps", 2, "--width", 32, "--height", 32)
    first = cli(*call, "--base-model", "anima-base", "--seed", 1, "--metadata").paths[0]
    settings = json.loads(first.with_suffix(".metadata.json").read_text())
    assert settings["base_model"] == "circlestone-labs/Anima" or settings["base_model"] == "anima-base"
    assert settings["guidance"] == 4.0


def test_a_repository_of_several_models():
    config = ModelConfig.from_name("circlestone-labs/Anima", "anima-base")
    assert config.aliases == ["anima-base"]
    assert ModelConfig.from_name("circlestone-labs/Anima").aliases[0] == "anima-turbo"
    pipeline = Anima.__new__(Anima)
    assert pipeline.default_model == "anima-turbo"


# ---- saving, folders of mflux 0.24, quantizing


NAMES_024 = {
    "text_encoder": ((r"model\.", ""),),
    "vae": (
        (r"^decoder\.up_blocks\.(\d+)\.", r"decoder.up_block\1."),
        (r"\.resample\.1\.", ".resample_conv."),
        (r"\.conv_shortcut\.", ".skip_conv."),
        (
            r"^encoder\.down_blocks\.(\d+)\.",
            lambda found: "encoder.down_blocks.{}.{}.".format(
                int(found[1]) // 3,
                "downsamplers.0" if int(found[1]) % 3 == 2 else f"resnets.{int(found[1]) % 3}",
            ),
        ),
        (r"\.gamma$", ".weight"),
    ),
}


@pytest.mark.usefixtures("all_at_once")
@pytest.mark.parametrize("bits", [None, 8])
def test_a_folder_of_mflux_024(tmp_path, bits):
    source = write_tiny(tmp_path / "source", wide=True, changes=AS_PUBLISHED)
    old = write_as_024(source, tmp_path / "old", NAMES_024, flat_norms=True)
    shutil.move(old / "t5_tokenizer", old / "tokenizer_2")
    tensors = single_file_names(
        dict(FolderTensors(source / "text_conditioner")), dict(FolderTensors(source / "transformer")), ""
    )
    if bits:
        for name in [name for name in tensors if "blocks." in name and "llm_adapter" not in name]:
            value = tensors[name]
            if value.ndim == 2 and value.shape[1] % 64 == 0 and "adaln" not in name:
                stem = name.removesuffix("weight")
                packed = zip(("weight", "scales", "biases"), mx.quantize(value, 64, bits), strict=True)
                tensors |= {stem + leaf: array for leaf, array in packed}
    (old / "transformer").mkdir()
    mx.save_safetensors(str(old / "transformer" / "0.safetensors"), tensors)
    index = {"metadata": {"mflux_version": "0.24.0"}, "weight_map": dict.fromkeys(tensors, "0.safetensors")}
    write_json(old / "transformer" / "model.safetensors.index.json", index)

    stored, fresh = anima(old), anima(source, quantize=bits)
    assert stored.bits == bits
    for part in ("text_encoder", "text_conditioner", "vae"):
        ours, theirs = (dict(tree_flatten(getattr(each, part).parameters())) for each in (stored, fresh))
        assert ours.keys() == theirs.keys()
        assert all(mx.array_equal(value, theirs[name]) for name, value in ours.items()), part
    assert np.abs(generated(stored) - generated(fresh)).max() <= (0 if bits is None else 12)
    stored.save_model(str(tmp_path / "new"))
    assert np.array_equal(generated(anima(tmp_path / "new")), generated(stored))


def test_what_stays_dense(tmp_path):
    wide = write_tiny(tmp_path / "wide", wide=True)
    pipeline = anima(wide, quantize=4)
    for part in ("text_encoder", "text_conditioner"):
        assert not any(name.endswith("scales") for name, _ in tree_flatten(getattr(pipeline, part).parameters()))
    packed = {name for name, _ in tree_flatten(pipeline.transformer.parameters()) if name.endswith("scales")}
    assert packed and all(re.search(r"attn\d\.to_|\.ff\.net\.|^proj_out", name) for name in packed)


def test_three_bits_are_refused(cli, in_folder, model):
    with pytest.raises(UsageError, match="in 3 bits Anima gives noise"):
        anima(model, quantize=3)
    result = cli("generate-anima", "--model", model, "--base-model", "anima-turbo", "--prompt", PROMPT, "-q", 3)
    assert result.status == 2 and "3 gives noise" in result.errors[0]


# ---- LoRAs

LAYERS = {
    "transformer_blocks.0.attn1.to_q": "blocks.0.self_attn.q_proj",
    "transformer_blocks.1.attn2.to_out.0": "blocks.1.cross_attn.output_proj",
    "transformer_blocks.0.ff.net.0.proj": "blocks.0.mlp.layer1",
    "transformer_blocks.1.norm2.linear_1": "blocks.1.adaln_modulation_cross_attn.1",
    "patch_embed.proj": "x_embedder.proj.1",
    "time_embed.t_embedder.linear_2": "t_embedder.1.linear_2",
    "norm_out.linear_2": "final_layer.adaln_modulation.2",
    "proj_out": "final_layer.linear",
}
ADAPTER = ("blocks.0.cross_attn.k_proj", "blocks.0.self_attn.o_proj", "blocks.0.mlp.2", "out_proj")


@pytest.mark.usefixtures("all_at_once")
@pytest.mark.parametrize(
    ("spelled", "down", "up"),
    [
        (lambda part, ours, theirs: f"{part}.{ours}", "lora_A", "lora_B"),
        (lambda part, ours, theirs: f"diffusion_model.{theirs}", "lora_A", "lora_B"),
        (lambda part, ours, theirs: f"net.{theirs}", "lora_A", "lora_B"),
        (lambda part, ours, theirs: theirs, "lora_down", "lora_up"),
        (lambda part, ours, theirs: f"lora_unet_{theirs.replace('.', '_')}", "lora_down", "lora_up"),
    ],
    ids=["PEFT", "ComfyUI", "trainer", "bare", "kohya"],
)
def test_lora(model, tmp_path, spelled, down, up):
    names = [("transformer", ours, theirs) for ours, theirs in LAYERS.items()]
    names += [("text_conditioner", layer, f"llm_adapter.{layer}") for layer in ADAPTER]
    plain, file, expected = anima(model), {}, {}
    for number, (part, ours, theirs) in enumerate(names):
        before = dict(tree_flatten(getattr(plain, part).parameters()))[f"{ours}.weight"]
        one, two = (mx.random.normal(shape, key=mx.random.key(2 * number + turn)) for turn, shape in
                    enumerate([(3, before.shape[1]), (before.shape[0], 3)]))  # fmt: skip
        name = spelled(part, ours, theirs)
        file |= {f"{name}.{down}.weight": one, f"{name}.{up}.weight": two}
        expected[part, ours] = before + 0.5 * (two @ one)
    mx.save_safetensors(str(tmp_path / "lora.safetensors"), file)
    changed = anima(model, lora_paths=[str(tmp_path / "lora.safetensors")], lora_scales=[0.5])
    for (part, ours), value in expected.items():
        found = dict(tree_flatten(getattr(changed, part).parameters()))[f"{ours}.weight"]
        assert np.allclose(found, value, atol=1e-4), (part, ours)
    (before,), (after,) = (each.encode_prompts(PROMPT) for each in (plain, changed))
    assert not mx.array_equal(before, after), "the conditioner is changed, and what it was asked before forgotten"


def test_kernels_of_the_file_are_turned():
    """The autoencoder's are those of more frames."""
    turns = layout_turns(AutoencoderWan(AutoencoderWan.config_class()))
    assert turns["encoder.conv_in.weight"](mx.zeros((96, 3, 3, 3, 3))).shape == (96, 3, 3, 3)

"""What models take: added up from published configurations, and told before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from support import not_built

from mflux.backend import mx
from mflux.cli import fits
from mflux.errors import UsageError
from mflux.models.common import memory, room
from mflux.models.common.family import built, families
from mflux.models.common.footprint import MACS, components, footprint, published_config, weights, working_set
from mflux.models.flux.model.transformer import FluxTransformer, FluxTransformerConfig
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.utils.memory import Memory

ROOT = Path(__file__).parents[3]
CONFIGS = json.loads((ROOT / "tests" / "data" / "surface" / "configs.json").read_text())
KEYS = [key for key in built() if key != "demo"]
# The published entry of each component, where its folder does not tell.
TRANSFORMERS = {
    "schnell": "FLUX.1-schnell", "dev": "FLUX.1-dev", "krea-dev": "FLUX.1-Krea-dev",
    "dev-kontext": "FLUX.1-Kontext-dev",
    "dev-fill": "FLUX.1-Fill-dev", "dev-fill-catvton": "FLUX.1-Fill-dev", "dev-depth": "FLUX.1-Depth-dev",
    "schnell-controlnet-canny": "FLUX.1-schnell", "flux2-klein-4b": "FLUX.2-klein-4B",
    "flux2-klein-9b": "FLUX.2-klein-9B", "flux2-klein-base-9b": "FLUX.2-klein-9B", "qwen-image": "Qwen-Image",
    "qwen-image-edit-2511": "Qwen-Image-Edit-2511", "fibo": "FIBO", "z-image": "Z-Image", "z-image-turbo": "Z-Image",
    "seedvr2-3b": "SeedVR2-3B", "seedvr2-7b": "SeedVR2-7B",
}  # fmt: skip


@pytest.mark.parametrize(("key", "entry"), TRANSFORMERS.items())
def test_sizes_are_the_published_ones(key, entry):
    (part,) = (part for part in components(key) if part.name == "transformer")
    config_class = part.module_class().config_class
    assert config_class.from_dict(published_config(key, part)) == config_class.from_dict(
        CONFIGS[f"{entry}/transformer"]
    )


def test_other_components_too():
    for key, folder, entry in [
        ("flux2-klein-9b", "text_encoder", "FLUX.2-klein-9B/text_encoder"),
        ("flux2-klein-4b", "text_encoder", "FLUX.2-klein-4B/text_encoder"),
        ("dev", "text_encoder_2", "FLUX.1/text_encoder_2"),
        ("seedvr2-3b", "vae", "SeedVR2/vae"),
        ("fibo", "vae", "FIBO/vae (Wan 2.2)"),
    ]:
        (part,) = (part for part in components(key) if part.folder == folder)
        config_class = part.module_class().config_class
        assert config_class.from_dict(published_config(key, part)) == config_class.from_dict(CONFIGS[entry])


def test_what_is_said_of_models_is_of_such_models():
    for family in families().values():
        for key, parts in family.published.items():
            known = {part.name: part.module_class().config_class for part in components(key)}
            for name, changes in parts.items():
                assert known[name].from_dict(changes) != known[name]()


@pytest.mark.parametrize("key", KEYS)
def test_nothing_is_loaded_and_fewer_bits_take_less(key):
    before = mx.get_active_memory()
    found = [footprint(key, bits) for bits in (None, 8, 4)]
    assert mx.get_active_memory() - before < 20e6
    for more, less in pairwise(found):
        # Qwen-Image's text encoder stays in 16 bits, and is the largest stage of its editing from 8 bits on.
        assert less.disk < more.disk and (less.peak < more.peak or less.stage == more.stage == "encode")
    assert found[0].peak < found[0].disk * 1.2


def test_memory_is_the_largest_stage_and_grows_with_the_image():
    small, large = footprint("dev"), footprint("dev", width=4096, height=4096)
    assert small.stage == "denoise" and small.disk == large.disk
    transformer = weights(FluxTransformer(FluxTransformerConfig()), late=True)
    assert small.peak == round(transformer * 1.15)
    assert large.peak > small.peak


def test_the_mac_that_it_fits():
    assert [round(working_set(mac) / 2**30, 1) for mac in MACS] == [10.7, 16.0, 21.3, 48.0, 96.0]
    one = footprint("z-image", 4)
    for mac in MACS:
        assert replace(one, peak=working_set(mac)).mac == mac
        assert replace(one, peak=working_set(mac) + 1).mac != mac
    assert replace(one, peak=10**12).mac is None


def test_the_published_table_is_true():
    """As `mflux doctor --plan all` prints it."""
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert "\n".join(fits.describe(fits.plans("all"))) in text


# ---- the command


def test_plan_of_a_model(cli):
    result = cli("doctor", "--plan", "z-image-turbo")
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "z-image-turbo, 1024 x 1024 pixels"
    assert [line.split()[0] for line in lines[2:]] == ["16", "8", "6", "5", "4", "3"]
    found = json.loads(cli("doctor", "--plan", "z-image-turbo", "--json").out)["z-image-turbo"]
    assert [row["mac"] for row in found] == [24, 16, 16, 16, 16, 16]


def test_plan_of_a_folder_is_that_folder_s(cli, tiny_dev):
    (rows,) = json.loads(cli("doctor", "--plan", tiny_dev, "--json").out).values()
    assert 0 < rows[0]["disk"] < 1e7


@pytest.mark.parametrize(
    ("model", "told"), [("demo", "fits everywhere"), ("nosuch", "is not known"), (not_built.KEY, "is not built yet")]
)
def test_plan_of_what_has_none(cli, model, told):
    result = cli("doctor", "--plan", model)
    assert result.status == 2 and len(result.errors) == 1
    assert told in result.errors[0]


def test_plan_and_selftest_exclude_each_other(cli):
    assert cli("doctor", "--plan", "dev", "--selftest").status == 2


# ---- what is refused


@pytest.fixture
def machine(monkeypatch):
    def give(total: int, most: int | None = None) -> None:
        monkeypatch.setattr(room, "machine_memory", lambda: Memory(total))
        monkeypatch.setattr(room, "recommended", lambda: most)

    return give


def check(bits=None, *, is_stored=False):
    room.check_weights(FluxTransformer, FluxTransformerConfig(), bits, is_stored=is_stored)


def test_weights_that_fit_in_no_case_are_refused_with_the_bits_that_would(machine, caplog):
    machine(100 * 10**9)
    check()
    machine(16 * 10**9)
    with pytest.raises(UsageError, match=r"this machine has 16 GB: --quantize 8 takes 9\.2 GB$"):
        check()
    machine(3 * 10**9)
    with pytest.raises(UsageError, match=r"in 8 bits, and this machine has 3 GB: it needs another machine$"):
        check(8)
    with pytest.raises(UsageError, match="it needs another machine$"):
        check(4, is_stored=True)
    assert caplog.messages == []


def test_what_metal_would_rather_not_have_is_warned_of(machine, caplog):
    machine(32 * 10**9, most=8 * 10**9)
    check(4)
    assert caplog.messages == []
    check(8)
    (told,) = caplog.messages
    assert told.endswith("and Metal recommends 8 GB at most on this Mac: --quantize 6 takes 7 GB")


def test_a_pipeline_asks_once(tiny_dev, monkeypatch):
    asked = []
    monkeypatch.setattr("mflux.models.common.pipeline.check_weights", lambda *_, **about: asked.append(about))
    model = Flux1(model_path=str(tiny_dev), quantize=8)
    for seed in (1, 2):
        model.generate_image(seed=seed, prompt="x", num_inference_steps=1, width=32, height=32)
    assert asked == [{"is_stored": False}]


def test_on_a_mac_memory_is_wired_while_steps_are_made(monkeypatch):
    """As far as Metal recommends, and as before in the end."""
    limits = [0]
    monkeypatch.setattr(memory, "recommended", lambda: 12345)
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: limits.append(limit) or limits[-2])
    with pytest.raises(KeyboardInterrupt), memory.keeping_memory():
        assert limits == [0, 12345]
        raise KeyboardInterrupt
    assert limits == [0, 12345, 0]


def test_metal_alone_recommends(monkeypatch):
    assert memory.recommended() is None or mx.metal.is_available()
    monkeypatch.setattr(memory, "on_gpu", lambda: True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 22906503168})
    assert memory.recommended() == 22906503168
    monkeypatch.setattr(mx, "device_info", dict)
    assert memory.recommended() is None

"""A size that cannot be drawn with this machine's memory is refused; one that can never is."""

from __future__ import annotations

import pytest

from mflux.backend import mx, on_gpu
from mflux.errors import UsageError
from mflux.models.common import room
from mflux.models.common.family import families
from mflux.models.common.networks.layers import rotary_embedding
from mflux.models.common.networks.mmdit import TransformerBlock, latent_image_ids
from mflux.models.flux.model.transformer import FluxTransformerConfig
from mflux.models.flux.variants.txt2img.flux import Flux1
from mflux.utils.memory import Memory, machine_memory

GB = 10**9
SMALL = FluxTransformerConfig(num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6))

pytestmark = pytest.mark.skipif(on_gpu() and not mx.metal.is_available(), reason="judges no GPU's own memory")


@pytest.fixture
def machine(monkeypatch):
    """Let the machine have so many bytes."""

    def give(total: int, **more: int) -> None:
        monkeypatch.setattr(room, "machine_memory", lambda: Memory(total, **more))

    return give


def test_this_machine():
    memory = machine_memory()
    assert 0 < (memory.available or 1) <= memory.total
    assert memory.most <= memory.total + memory.swap


def test_the_most_that_a_process_can_have():
    assert Memory(100).most == Memory(100, available=5).most == 100
    assert Memory(100, limit=30).most == 30
    # Slow, and possible.
    assert Memory(100, limit=30, swap=7).most == 37


def test_it_is_refused_exactly_where_less_is_there(machine):
    needed = room.least_bytes(FluxTransformerConfig(), 4096, 2048)
    machine(needed)
    room.check_room(FluxTransformerConfig(), 4096, 2048)
    machine(needed - 10, swap=9)
    with pytest.raises(UsageError, match=r"^a picture of 4096 × 2048 pixels takes at least .*, and this machine has "):
        room.check_room(FluxTransformerConfig(), 4096, 2048)


def test_what_is_proposed_fits(machine):
    for width, height in ((16384, 16384), (16384, 1024), (32, 16384)):
        for total in (GB // 10, GB, 8 * GB, 64 * GB):
            machine(total)
            try:
                room.check_room(FluxTransformerConfig(), width, height)
            except UsageError as error:
                words = str(error).removesuffix(", or less").split()
                sides = [int(words[words.index(name) + 1]) for name in ("--width", "--height")]
                assert all(side % 16 == 0 and 0 < side <= old for side, old in zip(sides, (width, height), strict=True))
                room.check_room(FluxTransformerConfig(), *sides)
                assert room.least_bytes(FluxTransformerConfig(), *sides) <= total / 2
    machine(100)
    with pytest.raises(UsageError, match="draw it on another machine$"):
        room.check_room(FluxTransformerConfig(), 16384, 16384)


def test_usual_sizes_are_drawn_on_usual_machines(machine):
    """On the smallest machine that can hold such a model in 4 bits at all."""
    machine(12 * GB)
    for width, height in ((1024, 1024), (1344, 768), (1536, 1024)):
        for family in families().values():
            for config in transformers(family):
                room.check_room(config, width, height)


def transformers(family):
    return [c.module_class().config_class() for c in family.components if c.name == "transformer"]


def test_every_family_is_judged():
    judged = [name for name, family in families().items() if transformers(family)]
    assert len(judged) >= 5
    for name in judged:
        for config in transformers(families()[name]):
            assert room.least_bytes(config, 8192, 8192) > 10 * room.least_bytes(config, 1024, 1024) > 0


@pytest.mark.skipif(on_gpu(), reason="MLX counts otherwise there")
@pytest.mark.parametrize("side", [256, 512, 768])
def test_no_more_is_counted_than_a_block_takes(side):
    tokens = (side // 16) ** 2
    block = TransformerBlock(SMALL.num_attention_heads, SMALL.attention_head_dim)
    image, text = mx.zeros((1, tokens, SMALL.inner_dim)), mx.zeros((1, 1, SMALL.inner_dim))
    ids = mx.concatenate([mx.zeros((1, 3)), latent_image_ids(side // 16, side // 16).astype(mx.float32)])
    rotary = rotary_embedding(ids, SMALL.axes_dims_rope)
    mx.eval(block.parameters(), image, text, rotary)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(block(image, text, image[:, 0], rotary))
    assert room._denoising(SMALL, tokens) <= mx.get_peak_memory() - before + image.nbytes


def test_a_command_refuses_it_before_any_work(cli, in_folder, tiny_schnell, machine, monkeypatch):
    monkeypatch.setattr(Flux1, "encode_prompts", lambda self, *prompts: pytest.fail("it began"))
    machine(2 * GB)
    call = ("generate", "--model", tiny_schnell, "--prompt", "x", "--width", 16384, "--height", 8192)
    result = cli(*call)
    (told,) = result.errors
    assert result.status == 2
    assert told.startswith("error: a picture of 16384 × 8192 pixels takes at least ")
    assert told.endswith(", or less")
    # The size of a stranger's picture as well.
    (in_folder / "old.json").write_text('{"width": 16384, "height": 8192, "prompt": "x"}')
    assert cli("generate", "--model", tiny_schnell, "-C", "old.json").errors == [told]
    assert [path.name for path in in_folder.iterdir()] == ["old.json"]

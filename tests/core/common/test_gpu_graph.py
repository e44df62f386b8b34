"""What a step costs on a GPU beside its products, frozen: nobody adds a pass over memory unseen.

Blocks of 256 channels, in bfloat16, whose graphs a GPU would compute (`support.graph`); bytes count in units of all
tokens' channels in 16 bits, so they are those of the published widths.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.graph import NORMS, PRODUCTS, Graph, traced

from mflux.backend import mx, nn, tree_map
from mflux.models.anima.model import transformer as anima
from mflux.models.common.networks import mmdit
from mflux.models.common.networks.layers import Turns, rotary_embedding
from mflux.models.common.networks.modulation import Ahead, ModulationLinear
from mflux.models.common.networks.once import Once
from mflux.models.ernie_image.model import transformer as ernie_image
from mflux.models.flux.model import transformer as flux
from mflux.models.flux2.model import transformer as flux2
from mflux.models.flux3.model import transformer as flux3
from mflux.models.ideogram4.model import transformer as ideogram4
from mflux.models.krea2.model import transformer as krea2
from mflux.models.qwen.model import transformer as qwen
from mflux.models.seedvr2.model import transformer as seedvr2
from mflux.models.z_image.model import transformer as z_image

HEADS, HEAD = 2, 128
WIDTH = HEADS * HEAD
ROWS, COLUMNS = 12, 8
IMAGE, TEXT = ROWS * COLUMNS, 32
TOKENS = IMAGE + TEXT
UNIT = 2 * TOKENS * WIDTH
# As large as the text's tokens are: what is smaller belongs to the condition.
LEAST = TEXT * WIDTH
# Widths of heads for which Metal has a kernel for attention as a whole.
FUSED_HEADS = {64, 72, 80, 96, 128}
AXES = {"attention_head_dim": HEAD, "num_attention_heads": HEADS}


def in_16_bits(module: nn.Module) -> nn.Module:
    module.update(tree_map(lambda value: value.astype(mx.bfloat16), module.parameters()))
    # Else how they were made would be part of the graph.
    mx.eval(module.parameters())
    module.eval()
    module.freeze()
    return module


def tokens(length: int, width: int = WIDTH) -> mx.array:
    return mx.zeros((1, length, width), mx.bfloat16)


def rotary() -> Turns:
    ids = mx.zeros((TOKENS, 3), mx.int32)
    turns = rotary_embedding(ids, (16, 56, 56))
    # Made once an image, before its blocks.
    mx.eval(turns.factors, turns.of_halves)
    return turns


def vectors(count: int) -> list[mx.array]:
    return [tokens(1) for _ in range(count)]


def condition(width: int = WIDTH) -> mx.array:
    return mx.zeros((1, width), mx.bfloat16)


def flux_double() -> Graph:
    block, turns = in_16_bits(mmdit.TransformerBlock(HEADS, HEAD)), rotary()
    return traced(lambda image, text: block(image, text, condition(), turns), tokens(IMAGE), tokens(TEXT))


def flux_single() -> Graph:
    block, turns = in_16_bits(mmdit.SingleTransformerBlock(HEADS, HEAD)), rotary()
    return traced(lambda x: block(x, condition(), turns), tokens(TOKENS))


def qwen_block() -> Graph:
    config = qwen.QwenTransformerConfig.from_dict(AXES | {"axes_dims_rope": [16, 56, 56]})
    block, turns = in_16_bits(qwen.TransformerBlock(config)), rotary()
    drawn = mx.ones((IMAGE, 1), mx.bool_)
    return traced(lambda image, text: block(image, text, condition(), None, drawn, turns), tokens(IMAGE), tokens(TEXT))


FLUX2 = flux2.Flux2TransformerConfig.from_dict(AXES)


def flux2_double() -> Graph:
    block, turns = in_16_bits(flux2.DoubleBlock(FLUX2)), rotary()
    parts = vectors(6), vectors(6)
    return traced(lambda image, text: block(image, text, *parts, turns, None), tokens(IMAGE), tokens(TEXT))


def flux2_single() -> Graph:
    block, turns = in_16_bits(flux2.SingleBlock(FLUX2)), rotary()
    return traced(lambda x: block(x, vectors(3), turns)[0], tokens(TOKENS))


Z_IMAGE = {"dim": WIDTH, "n_heads": HEADS, "n_kv_heads": HEADS, "axes_dims": [16, 56, 56]}


def z_image_layer() -> Graph:
    config = z_image.ZImageTransformerConfig.from_dict(Z_IMAGE)
    block, turns = in_16_bits(z_image.TransformerBlock(config)), rotary()
    return traced(lambda x: block(x, turns, condition(config.condition_dim)), tokens(TOKENS))


def flux3_block() -> Graph:
    axes = (32, 32, 32, 32)
    block = in_16_bits(flux3.Block(flux3.Flux3TransformerConfig.from_dict(AXES | {"axes_dims_rope": axes})))
    turns = rotary()
    return traced(lambda text, image: block([text, image], [vectors(3)] * 2, turns), tokens(TEXT), tokens(IMAGE))


def anima_block() -> Graph:
    config = anima.AnimaTransformerConfig.from_dict(AXES | {"text_embed_dim": 64, "adaln_lora_dim": 64})
    block, turns = in_16_bits(anima.Block(config)), rotary()
    text = tokens(TEXT, 64)
    return traced(lambda x: block(x, text, condition(4 * WIDTH), turns), tokens(TOKENS))


def ernie_block() -> Graph:
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "ffn_hidden_size": 3 * WIDTH}
    config = ernie_image.ErnieTransformerConfig.from_dict(sizes)
    block = in_16_bits(ernie_image.TransformerBlock(config))
    turns = ernie_image.rotary_factors(mx.zeros((TOKENS, 3), mx.int32), config)
    mx.eval(turns)
    return traced(lambda x: block(x, vectors(6), turns), tokens(TOKENS))


def krea2_block() -> Graph:
    sizes = AXES | {"num_key_value_heads": 1, "intermediate_size": 3 * WIDTH, "axes_dims_rope": [32, 48, 48]}
    block, turns = in_16_bits(krea2.TransformerBlock(krea2.Krea2TransformerConfig.from_dict(sizes))), rotary()
    return traced(lambda x: block(x, vectors(6), turns), tokens(TOKENS))


def ideogram4_block() -> Graph:
    sizes = AXES | {"intermediate_size": 3 * WIDTH, "adaln_dim": 64, "mrope_section": [24, 20, 20]}
    block = in_16_bits(ideogram4.TransformerBlock(ideogram4.Ideogram4TransformerConfig.from_dict(sizes)))
    turns = rotary()
    return traced(lambda x: block(x, turns, condition(64)), tokens(TOKENS))


def seedvr2_block() -> Graph:
    sizes = {"vid_dim": WIDTH, "txt_dim": WIDTH, "emb_dim": 6 * WIDTH, "heads": HEADS, "head_dim": HEAD}
    config = seedvr2.SeedVR2TransformerConfig.from_dict(sizes)
    block = in_16_bits(seedvr2.Block(config, shared=False, video_only=False))
    windows = seedvr2.Windows(ROWS, COLUMNS, config.window[1:], shifted=False)
    turns = seedvr2.rotaries(config, windows, TEXT)
    mx.eval(*(part.factors for part in turns))
    time = mx.zeros((WIDTH, 2, 3), mx.bfloat16)
    return traced(lambda image, text: block(image, text, time, windows, turns), tokens(IMAGE), tokens(TEXT))


# Kernels over tokens, and what they move beside products. FIBO's blocks are FLUX.1's.
BLOCKS: dict[str, tuple[Callable[[], Graph], int, float]] = {
    "FLUX.1 double": (flux_double, 32, 32.1),
    "FLUX.1 single": (flux_single, 14, 21.0),
    "Qwen-Image": (qwen_block, 32, 32.1),
    "FLUX.2 double": (flux2_double, 32, 30.1),
    "FLUX.2 single": (flux2_single, 11, 19.0),
    "Z-Image": (z_image_layer, 19, 30.0),
    "FLUX.3": (flux3_block, 18, 24.0),
    "Anima": (anima_block, 25, 33.6),
    "ERNIE-Image": (ernie_block, 19, 31.0),
    "Krea 2": (krea2_block, 23, 35.1),
    "Ideogram 4": (ideogram4_block, 19, 31.0),
    "SeedVR2": (seedvr2_block, 42, 44.1),
}


@pytest.fixture(scope="module")
def graphs() -> dict[str, Graph]:
    return {name: make() for name, (make, _, _) in BLOCKS.items()}


@pytest.mark.parametrize("name", BLOCKS)
def test_no_more_kernels_and_bytes_than_were_reached(graphs, name):
    _, kernels, units = BLOCKS[name]
    graph = graphs[name]
    found = [one.name for one in graph.kernels(LEAST)]
    assert (len(found), round(graph.bytes(LEAST) / UNIT, 1)) == (kernels, units), found


def test_a_pass_more_is_seen(graphs, monkeypatch):
    monkeypatch.setattr(mmdit, "residual", lambda x, gate, y: x + gate * y)
    more, before = flux_single(), graphs["FLUX.1 single"]
    assert len(more.kernels(LEAST)) == len(before.kernels(LEAST)) + 1
    # It is written, and read again.
    assert more.bytes(LEAST) == pytest.approx(before.bytes(LEAST) + 2 * UNIT, rel=0.01)


@pytest.mark.parametrize("name", BLOCKS)
def test_nothing_wide_is_float32(graphs, name):
    """A chain computes in float32 in its registers alone; the factors of the turns are the one float32 array."""
    for one in graphs[name].operations:
        if one.name in PRODUCTS:
            assert mx.float32 not in {array.dtype for array in (*one.inputs, *one.outputs)}, one
        elif one.size >= LEAST:
            assert mx.float32 not in {array.dtype for array in one.outputs}, one


@pytest.mark.parametrize("name", BLOCKS)
def test_norms_read_rows_in_order(graphs, name):
    graph = graphs[name]
    norms = [one for one in graph.operations if one.name in NORMS]
    assert norms
    assert not [one for one in norms if graph.is_transposed(one.inputs[0])]


@pytest.mark.parametrize("name", BLOCKS)
def test_nothing_wide_is_written_together(graphs, name):
    """Queries, keys and values of two streams are, 24 channels times as many heads as the model has."""
    joined = [one.outputs[0].shape for one in graphs[name].operations if one.name == "Concatenate"]
    wide = [shape for shape in joined if shape[-1] > HEAD]
    # FLUX.3's streams are normed each on its own, and then projected as one.
    assert len(wide) == (name == "FLUX.3"), joined


@pytest.mark.parametrize("name", BLOCKS)
def test_attention_is_one_kernel(graphs, name):
    found = [one for one in graphs[name].operations if one.name == "scaled_dot_product_attention"]
    # Anima's looks at the text as well, and SeedVR2's windows of each shape are a batch.
    assert len(found) == {"Anima": 2}.get(name, 1)
    assert {array.shape[-1] for array in found[0].inputs} <= FUSED_HEADS


# ---- a step of a whole model: what is in it that belongs before the loop


def modules() -> dict[str, tuple[nn.Module, Callable[..., mx.array], mx.array, int]]:
    """Each family's transformer with a few blocks, its call, its latents, and the condition's channels."""
    small = AXES | {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 64, "in_channels": 16}
    one = flux.FluxTransformer(flux.FluxTransformerConfig.from_dict(small | {"pooled_projection_dim": 32}))
    two = flux2.Flux2Transformer(flux2.Flux2TransformerConfig.from_dict(small))
    third = qwen.QwenTransformer(
        qwen.QwenTransformerConfig.from_dict(
            AXES | {"num_layers": 2, "joint_attention_dim": 64, "in_channels": 16, "axes_dims_rope": [16, 56, 56]}
        )
    )
    fourth = z_image.ZImageTransformer(
        z_image.ZImageTransformerConfig.from_dict(Z_IMAGE | {"n_layers": 1, "n_refiner_layers": 1, "cap_feat_dim": 64})
    )
    prompt, pooled, places = tokens(TEXT, 64), condition(32), flux.latent_image_ids(ROWS, COLUMNS)
    mx.eval(prompt, pooled, places)
    return {
        "FLUX.1": (
            one,
            lambda x, sigma, known, once: one(
                x, sigma=sigma, prompt_embeds=prompt, pooled_prompt_embeds=pooled, known=known, once=once,
                image_ids=places, guidance=mx.array([4.0]),
            ),
            tokens(IMAGE, 16), WIDTH,
        ),
        "FLUX.2": (
            two,
            lambda x, sigma, known, once: two(
                x, sigma=sigma, prompt_embeds=prompt, image_ids=flux2.grid_ids(ROWS, COLUMNS),
                text_ids=flux2.text_ids(TEXT), known=known, once=once,
            ),
            tokens(IMAGE, 16), WIDTH,
        ),
        "Qwen-Image": (
            third,
            lambda x, sigma, known, once: third(
                x, sigma=sigma, prompt_embeds=prompt, grids=[(ROWS, COLUMNS)], known=known, once=once
            ),
            tokens(IMAGE, 16), WIDTH,
        ),
        "Z-Image": (
            fourth,
            lambda x, sigma, known, once: fourth(x, timestep=sigma, prompt_embeds=prompt, known=known, once=once),
            mx.zeros((1, 16, 2 * ROWS, 2 * COLUMNS), mx.bfloat16), fourth.config.condition_dim,
        ),
    }  # fmt: skip


MODELS = ["FLUX.1", "FLUX.2", "Qwen-Image", "Z-Image"]


@pytest.mark.parametrize("name", MODELS)
def test_what_belongs_to_the_image_is_made_once(name):
    module, call, start, _ = modules()[name]
    in_16_bits(module)
    once, sigma = Once(), mx.array([0.5])
    mx.eval(call(start, sigma, None, once))

    def apart(once: Once | None) -> list[str]:
        """What of a step follows from nothing that changes with it."""
        graph = traced(lambda x, sigma: call(x, sigma, None, once), start, sigma)
        changing = set(graph.inputs)
        for one in graph.operations:
            if changing & {array.name for array in one.inputs}:
                changing |= {array.name for array in one.outputs}
        return [one.name for one in graph.kernels(LEAST) if not changing & {array.name for array in one.outputs}]

    assert apart(None)
    assert apart(once) == []


@pytest.mark.parametrize("name", MODELS)
def test_a_step_reads_no_modulation(name):
    module, call, start, levels = modules()[name]
    in_16_bits(module)
    widths = {layer.weight.shape[::-1] for _, layer in module.named_modules() if isinstance(layer, ModulationLinear)}
    ahead = Ahead({0.5: condition(levels)})
    ahead.work_out(module)
    for known, reads in ((ahead.at(0.5), False), (None, True)):
        graph = traced(lambda x, known=known: call(x, mx.array([0.5]), known, None), start)
        products = [one for one in graph.operations if one.name in ("Matmul", "AddMM")]
        # Products of one row with a modulation's weights, which stand in the graph transposed.
        shapes = {array.shape for one in products for array in one.inputs if one.outputs[0].shape[-2] == 1}
        assert bool(shapes & widths) is reads, shapes
        assert not [one for one in products if mx.float32 in {array.dtype for array in one.inputs}]

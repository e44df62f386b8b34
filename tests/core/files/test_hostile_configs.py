"""Configurations from strangers: each value exchanged for hostile ones ends in a sentence or a model."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import mflux.models
from mflux.backend import mx, nn, tree_flatten
from mflux.checkpoints.loading import build, fill, published_turns
from mflux.errors import CheckpointError, MfluxError, UnsafeCheckpointError
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig, ScheduleConfig
from mflux.models.common.controls.depth_pro.dinov2 import Dinov2Model
from mflux.models.common.controls.depth_pro.network import DepthProForDepthEstimation
from mflux.models.common.networks.autoencoders.kl import AutoencoderKL
from mflux.models.common.networks.layers import embedded, looked_up
from mflux.models.common.networks.qwen3_vl import Qwen3VLForConditionalGeneration
from mflux.models.common.networks.text_encoders.clip import CLIPTextEncoder
from mflux.models.common.networks.text_encoders.t5 import T5Encoder, relative_position_buckets
from mflux.models.flux.model.transformer import FluxTransformer
from mflux.models.seedvr2.model.autoencoder import SeedVR2Autoencoder
from mflux.models.seedvr2.model.transformer import SeedVR2Transformer

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
# Small enough that a published default in place of a value changes a shape, and costs nothing.
COMPONENTS: dict[type[nn.Module], dict[str, Any]] = {
    CLIPTextEncoder: {
        "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 2,
    },
    T5Encoder: {
        "vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
    },
    AutoencoderKL: {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1, "norm_num_groups": 4, "act_fn": "silu", "mid_block_add_attention": True,
        "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.5, "shift_factor": 0.1,
        "latents_mean": None, "latents_std": None,
    },
    FluxTransformer: {
        "patch_size": 1, "in_channels": 16, "out_channels": None, "num_layers": 1, "num_single_layers": 2,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 16,
        "guidance_embeds": True, "axes_dims_rope": [4, 6, 6],
    },
    Dinov2Model: VIT | {"mlp_ratio": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "num_channels": 3,
                        "qkv_bias": True, "use_swiglu_ffn": False, "model_type": "dinov2"},
    DepthProForDepthEstimation: {
        "patch_size": 16, "scaled_images_ratios": [0.5, 1], "scaled_images_overlap_ratios": [0.0, 0.5],
        "scaled_images_feature_dims": [16, 16], "intermediate_hook_ids": [1], "intermediate_feature_dims": [8],
        "merge_padding_value": 1, "fusion_hidden_size": 8, "use_batch_norm_in_fusion_residual": False,
        "use_bias_in_fusion_residual": True, "use_fov_model": True, "num_fov_head_layers": 2,
        "patch_model_config": VIT, "image_model_config": VIT, "fov_model_config": VIT,
    },
    SeedVR2Transformer: {
        "vid_in_channels": 5, "vid_out_channels": 2, "vid_dim": 12, "txt_in_dim": 10, "txt_dim": 12, "emb_dim": 72,
        "heads": 2, "head_dim": 16, "expand_ratio": 4, "norm_eps": 1e-5, "qk_bias": False, "patch_size": [1, 2, 2],
        "num_layers": 3, "mm_layers": 2, "mlp_type": "normal", "rope_type": "mmrope3d", "rope_dim": 12,
        "vid_out_norm": "fusedrms", "window": [4, 3, 3],
    },
    SeedVR2Autoencoder: {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock3D"] * 2, "up_block_types": ["UpDecoderBlock3D"] * 2,
        "layers_per_block": 1, "decoder_layers_per_block": 2, "norm_num_groups": 4, "act_fn": "silu",
        "temporal_scale_num": 1, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.5,
        "shift_factor": 0.0,
    },
    Qwen3VLForConditionalGeneration: {
        "model_type": "qwen3_vl", "image_token_id": 5, "tie_word_embeddings": True,
        "text_config": {
            "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "hidden_act": "silu",
            "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "attention_bias": False, "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True},
            "rope_parameters": None,
        },
        "vision_config": {
            "depth": 2, "hidden_size": 16, "hidden_act": "gelu_pytorch_tanh", "intermediate_size": 24, "num_heads": 2,
            "in_channels": 3, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2,
            "out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
            "rope_parameters": None,
        },
    },
}  # fmt: skip
HOSTILE = [
    None, True, 0, 1, -1, 3, 999, 2**31 - 1, 2**31, 2**40, 10**12, 10**400, 0.0, 1.5, -1e300, 1e-300, float("nan"),
    float("inf"), "24", "", "x" * 10**6, "\x1b[2J", "\ud800", [], [0], [1, 2, 3], [2**31 - 1] * 2, [float("nan")],
    [[1]], ["x"], [1] * 2000, {}, {"a": 1}, {"rope_type": 5}, {"mrope_section": "abc"},
]  # fmt: skip


def tensors_of(module_class, values):
    module = module_class(module_class.config_class.from_dict(values))
    turns = published_turns(module)
    return {
        name: turns.get(name, lambda value: value)(mx.zeros(value.shape))
        for name, value in tree_flatten(module.parameters())
    }


def places(values, path=()):
    for name, value in values.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


def exchanged(values, path, hostile):
    values = json.loads(json.dumps(values))
    inner = values
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = hostile
    return values


@pytest.mark.parametrize("module_class", COMPONENTS, ids=lambda module_class: module_class.__name__)
def test_every_value_exchanged_for_hostile_ones(module_class):
    values = COMPONENTS[module_class]
    tensors = tensors_of(module_class, values)
    fill(build(module_class, values, tensors, source="config.json"), tensors, source="x")
    refused = 0
    for path in places(values):
        for hostile in HOSTILE:
            try:
                module = build(module_class, exchanged(values, path, hostile), tensors, source="config.json")
                fill(module, tensors, source="x")
            except MfluxError as error:
                refused += 1
                assert str(error).isprintable()
                assert len(str(error)) < 3000
    assert refused > 10 * len(values)


@pytest.mark.parametrize("module_class", COMPONENTS, ids=lambda module_class: module_class.__name__)
@pytest.mark.parametrize("number", [20, 999])
def test_more_layers_than_the_weights_have_are_refused_before_anything_is_built(module_class, number):
    values = COMPONENTS[module_class]
    tensors = tensors_of(module_class, values)

    class Never:
        config_class = module_class.config_class

        def __init__(self, config):
            raise AssertionError("it was built")

    counts = [path for path in places(values) if "layers" in path[-1] or path[-1] == "depth"]
    assert counts
    for path in counts:
        with pytest.raises(CheckpointError, match=rf"config\.json.*{path[-1]}|too small|image_size"):
            build(Never, exchanged(values, path, number), tensors, source="config.json")


def test_many_layers_need_as_many_tensors():
    config = FluxTransformer.config_class(num_layers=900)
    assert config.beyond(["transformer_blocks.999999999.weight"])
    assert config.beyond(["transformer_blocks.99999999999999999999999999.weight"])
    assert config.beyond([f"transformer_blocks.{number}.weight" for number in range(899)])
    assert not config.beyond([f"transformer_blocks.{number}.weight" for number in range(900)])


# ---- the rule itself


@dataclass(frozen=True)
class Inner(ComponentConfig):
    width: int = 2


@dataclass(frozen=True)
class Example(ComponentConfig):
    whole: int = 1
    real: float = 1.0
    flag: bool = False
    word: str = "a"
    maybe: int | None = None
    sides: tuple[int, ...] = (1,)
    pair: tuple[int, float] = (1, 1.0)
    grid: tuple[tuple[int, ...], ...] = ()
    either: int | tuple[int, ...] = 1
    kind: Literal["a", "b"] = "a"
    table: dict[str, Any] | None = None
    inner: Inner = field(default_factory=Inner)
    below: int = field(default=-1, metadata={"least": -9, "most": 9})
    anything: Any = None


class Scalar:
    """What numpy's scalars offer."""

    ndim = 0

    def __init__(self, value):
        self.value = value

    def item(self):
        return self.value


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("whole", 5, 5), ("whole", 5.0, 5), ("whole", Scalar(5), 5), ("real", 5, 5), ("real", Scalar(0.5), 0.5),
        ("flag", True, True), ("maybe", None, None), ("sides", [1, 2], (1, 2)), ("pair", [1, 2], (1, 2)),
        ("grid", [[1], []], ((1,), ())), ("either", [1], (1,)), ("kind", "b", "b"), ("below", -9, -9),
        ("table", {"a": [1, "x", None]}, {"a": (1, "x", None)}), ("anything", [{"a": 1.5}], ({"a": 1.5},)),
    ],
)  # fmt: skip
def test_values_that_fit(name, value, read):
    found = getattr(Example.from_dict({name: value}), name)
    assert found == read
    assert type(found) is type(read)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("whole", "5", "'5', not a whole number from 0 to 2,147,483,647"),
        ("whole", 5.5, "not a whole number"), ("whole", True, "not a whole number"), ("whole", None, "not a whole"),
        ("whole", -1, "not a whole number"), ("whole", 2**31, "not a whole number"), ("whole", [5], "not a whole"),
        ("real", float("nan"), "not a finite number"), ("real", 10**400, "not a finite"), ("real", "1", "finite"),
        ("flag", 1, "not true or false"), ("word", 5, "not a text"), ("word", None, "not a text"),
        ("maybe", "x", "not a whole number from 0 to 2,147,483,647 or null"), ("sides", 5, "not a list"),
        ("sides", [1, "x"], "not a list of which each is a whole number"), ("pair", [1], "not a list of 2"),
        ("sides", [1] * 1001, "not a list of at most 1,000"), ("kind", "c", "not one of 'a', 'b'"),
        ("table", 5, "not a table or null"), ("table", {"a": float("inf")}, "table.a is inf, not a finite number"),
        ("inner", 5, "not a table"), ("below", -10, "not a whole number from -9 to 9"),
        ("anything", float("nan"), "not a finite number"), ("anything", object(), "not a finite number"),
    ],
)  # fmt: skip
def test_values_that_do_not(name, value, told):
    with pytest.raises(CheckpointError) as caught:
        Example.from_dict({name: value, "unknown": object()}, source="x/config.json")
    assert str(caught.value).startswith((f"x/config.json: {name} is ", f"x/config.json: {name}.a is "))
    assert told in str(caught.value)


def all_configs(base=ComponentConfig):
    for name in (module.name for module in pkgutil.walk_packages(mflux.models.__path__, "mflux.models.")):
        if ".cli" not in name:
            importlib.import_module(name)
    for config in base.__subclasses__():
        if config.__module__.startswith("mflux."):
            yield config
            yield from all_configs(config)


def has_to_be_given(field):
    return field.default is MISSING and field.default_factory is MISSING


def parts():
    """Configurations that hold others, and where."""
    from mflux.models.common.networks.qwen2_5_vl import Qwen25VLEncoder

    for module_class in (DepthProForDepthEstimation, Qwen3VLForConditionalGeneration, Qwen25VLEncoder):
        for name in (one.name for one in fields(module_class.config_class)):
            if name.endswith("_config"):
                yield module_class, name


@pytest.mark.parametrize(("module_class", "name"), list(parts()))
@pytest.mark.parametrize("value", [5, 1.5, "x", [1], True])
def test_a_part_that_is_no_table(module_class, name, value):
    with pytest.raises(CheckpointError):
        module_class.config_class.from_dict({name: value})


def test_every_configuration_is_read_with_its_own_defaults_and_refuses_other_kinds():
    """All families': no annotation is one that the rule does not know."""
    # A base may leave the defaults to its subclasses.
    configs = {kind for kind in all_configs() if not any(map(has_to_be_given, fields(kind)))}
    assert len(configs) > 12
    for kind in configs:
        nested = {f.name for f in fields(kind) if isinstance(getattr(kind(), f.name), ComponentConfig)}
        values = {f.name: getattr(kind(), f.name) for f in fields(kind) if f.name not in nested}
        assert nested or kind.from_dict(values) == kind()
        for name, value in values.items():
            with pytest.raises(CheckpointError):
                kind.from_dict({name: object()})
            if isinstance(value, (int, float)):
                with pytest.raises(CheckpointError):
                    kind.from_dict({name: 10**400})


@pytest.mark.parametrize("ids", [[5, 20], [2**31 - 1], [-1]])
def test_tokens_that_an_encoder_does_not_have(ids):
    with pytest.raises(CheckpointError, match="do not belong together"):
        embedded(nn.Embedding(20, 4), mx.array([ids]))
    assert embedded(nn.Embedding(20, 4), mx.array([[0, 19]])).shape == (1, 2, 4)
    assert embedded(nn.Embedding(20, 4), mx.array([[]], dtype=mx.int32)).shape == (1, 0, 4)


def test_a_list_that_names_layers_of_another_component_is_no_count():
    @dataclass(frozen=True)
    class Control(ComponentConfig):
        control_layers_places: tuple[int, ...] = (0, 28)
        layers_per_block: tuple[int, ...] = (2, 3)

    assert list(Control().layer_counts()) == [("layers_per_block", 2), ("layers_per_block", 3)]


# ---- numbers that say where a table is read: MLX does not look whether that lies in it

T5 = COMPONENTS[T5Encoder]
BESIDE = [
    (T5Encoder, {"relative_attention_max_distance": 2}),
    (T5Encoder, {"relative_attention_max_distance": 1}),
    (T5Encoder, {"relative_attention_max_distance": 0}),
    (T5Encoder, {"relative_attention_num_buckets": 3}),
    (T5Encoder, {"relative_attention_num_buckets": 0}),
    (T5Encoder, {"relative_attention_max_distance": 2, "relative_attention_num_buckets": 11}),
    (Qwen3VLForConditionalGeneration, {"image_token_id": 20}),
    (Qwen3VLForConditionalGeneration, {"image_token_id": 2**31 - 1}),
]


@pytest.mark.parametrize(("module_class", "change"), BESIDE)
def test_a_number_that_would_read_beside_a_table(module_class, change):
    with pytest.raises(CheckpointError, match=next(iter(change))):
        module_class.config_class.from_dict(COMPONENTS[module_class] | change)


@pytest.mark.parametrize("buckets", [4, 5, 7, 8, 32, 33, 320])
@pytest.mark.parametrize("beyond", [1, 2, 100, 2**31 - 1])
def test_every_distance_has_a_bucket(buckets, beyond):
    most = min(buckets // 4 + beyond, 2**31 - 1)
    values = T5 | {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": most}
    config = T5Encoder.config_class.from_dict(values)
    distances = np.arange(-5000, 5001)
    found = relative_position_buckets(distances, buckets, config.relative_attention_max_distance)
    assert found.min() >= 0 and found.max() < buckets


@pytest.mark.parametrize("places", [[4], [-1], [0, 2**31 - 1], [[0, 1], [2, 5]]])
def test_a_row_that_a_table_does_not_have(places):
    table = nn.Embedding(4, 2)
    assert looked_up(table, mx.array([[0, 3]]), what="table").shape == (1, 2, 2)
    with pytest.raises(CheckpointError, match=r"of the table, which has 4"):
        looked_up(table, mx.array(places), what="table")
    packed = nn.QuantizedEmbedding(4, 64)
    with pytest.raises(CheckpointError, match=r"which has 4"):
        looked_up(packed, mx.array(places), what="table")


# Where MLX gathers by itself, and why that cannot read beside.
GATHERS = {
    "serve/workers.py": "takes jobs, no rows",
    "models/seedvr2/model/transformer.py": "by an order that was made of all places",
    "models/common/controls/depth_pro/network.py": "by places that are cut to the length",
    "models/common/controls/canny.py": "by the place of the largest, in numpy",
    "cpu/products.py": "clipped, in numpy",
    "models/seedvr2/colour.py": "clipped, in numpy",
    "models/fibo/vlm/generation.py": "by the number of a logit, and the head has as many as the table has rows",
}


def test_tables_are_read_in_one_place():
    """No embedding is called but by `embedded` and `looked_up`, and nothing else gathers that is not listed."""
    package = Path(mflux.__file__).parent
    embeddings, called = set(), set()
    trees = {path.relative_to(package).as_posix(): ast.parse(path.read_text()) for path in package.rglob("*.py")}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and re.search(r"\bEmbedding\(", ast.unparse(node.value)):
                embeddings |= {target.attr for target in node.targets if isinstance(target, ast.Attribute)}
    assert {"token_embedding", "relative_attention_bias", "pos_embed", "embed_tokens", "shared"} <= embeddings
    for name, tree in trees.items():
        for node in ast.walk(tree):
            by_attribute = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if by_attribute and node.func.attr in embeddings | {"take", "take_along_axis", "as_strided"}:
                called.add(name)
    assert called == GATHERS.keys()


# ---- schedules

SCHEDULE_FIELDS = [field.name for field in fields(ScheduleConfig)]
SOUND = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096, "shift": 3.0, "shift_terminal": None,
}  # fmt: skip


@pytest.mark.parametrize("key", ["schnell", "dev", "qwen-image", "z-image", "fibo", "flux2-klein-4b", "seedvr2-3b"])
@pytest.mark.parametrize("name", SCHEDULE_FIELDS)
def test_every_value_of_a_schedule_exchanged(key, name):
    """In every family, whichever of its schedules is asked for: finite noise levels from 1 to 0, or a sentence."""
    config = ModelConfig.from_name(key)
    for dynamic in (True, False):
        for hostile in (*HOSTILE, -20, 20, 0.001, 1000, 0.99, 256, 4096):
            asked = SOUND | {"use_dynamic_shifting": dynamic, name: hostile}
            try:
                settings = Config(
                    model_config=config.with_scheduler(asked), num_inference_steps=3, width=2048, height=2048
                )
                sigmas = np.array(settings.scheduler.sigmas)
            except MfluxError as error:
                assert str(error).isprintable() and len(str(error)) < 1000
                continue
            assert np.isfinite(sigmas).all() and sigmas[-1] == 0 and (np.diff(sigmas) <= 0).all(), (asked, sigmas)


@pytest.mark.parametrize("kind", [CheckpointError, UnsafeCheckpointError])
@pytest.mark.parametrize("quoted", ["x" * 10**6, "a\nb", "\x1b[2J", "\ud800", [1] * 10**5])
def test_what_a_message_quotes_of_a_file_is_fit_for_a_line(kind, quoted):
    message = str(kind(f"x holds a {quoted}"))
    assert message.isprintable() and len(message) <= 2500 and message.startswith("x holds a ")

"""Z-Image's other names: single files as diffusers converts them, and LoRAs of every layout.

Each LoRA's change is multiplied out here, layer by layer; where diffusers' loader reads the layout, its weights are
compared as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_z_image_controlnet_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from support.reference import as_numpy, draw, relative_error

from families.z_image.cases import controlnet_reference, pipeline_reference, write_z_image
from mflux.backend import tree_flatten
from mflux.checkpoints.published import PublishedFolder
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.modulation import ModulationLinear
from mflux.models.z_image import ZImage
from mflux.models.z_image.layouts import LAYOUT, controlnet_config

# What PEFT says when a file has the last layer but not what else ends in its name.
pytestmark = pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters, an inconsistency")
diffusers_logging.disable_progress_bar()
diffusers_logging.set_verbosity_error()

SCALE = 0.7
BLOCKS = ("noise_refiner.0", "noise_refiner.1", "context_refiner.1", "layers.0", "layers.2")
ATTENTION = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
GLOBALS = (
    "all_x_embedder.2-1", "all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1", "cap_embedder.1",
    "t_embedder.mlp.0", "t_embedder.mlp.2",
)  # fmt: skip


@pytest.fixture(autouse=True)
def all_at_once(monkeypatch):
    """Modulation is loaded with the rest: these tests look at every weight."""
    monkeypatch.setattr(ModulationLinear, "read_late", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_z_image(tmp_path_factory.mktemp("z-image") / "model")


def z_image(path, **options) -> ZImage:
    return ZImage(model_path=str(path), model_config=ModelConfig.z_image_turbo(), **options)


def flat(module) -> dict[str, np.ndarray]:
    return {name: as_numpy(value) for name, value in tree_flatten(module.parameters())}


# ---- single files


def original(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the authors' names."""
    found = {}
    for name, value in tensors.items():
        name = name.replace("all_x_embedder.2-1.", "x_embedder.").replace("all_final_layer.2-1.", "final_layer.")
        name = name.replace(".norm_q.", ".q_norm.").replace(".norm_k.", ".k_norm.").replace(".to_out.0.", ".out.")
        if ".to_q." in name:
            value = torch.cat([tensors[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"])
            name = name.replace(".to_q.", ".qkv.")
        elif ".to_k." in name or ".to_v." in name:
            continue
        found[name] = value
    return found


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_single_file(folder, tmp_path, monkeypatch, prefix):
    published = load_file(next((folder / "transformer").glob("*.safetensors")))
    theirs = {prefix + name: value for name, value in original(published).items()}
    theirs |= {f"{prefix}norm_final.weight": torch.ones(48)}
    file = tmp_path / "z-image-turbo.safetensors"
    save_file(theirs, file)
    monkeypatch.setattr("mflux.models.common.model.resolve", lambda *_, **__: folder)
    ours = flat(z_image(file).transformer)
    expected = convert_z_image_transformer_checkpoint_to_diffusers(dict(theirs))
    assert set(ours) == set(expected) == set(published)
    for name, value in expected.items():
        assert np.array_equal(ours[name], value.numpy()), name


@pytest.mark.parametrize("trained", [True, False])
def test_controlnet_file_is_read_as_diffusers_reads_it(tmp_path, trained):
    """Which of a refiner's weights are taken depends on whether its first projection was trained."""
    model = draw(controlnet_reference(control_layers_places=list(range(0, 30, 2)), control_in_dim=33), seed=3)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    if not trained:
        tensors["control_noise_refiner.0.before_proj.weight"].zero_()
    file = tmp_path / "Union.safetensors"
    save_file(tensors, file)
    opened = PublishedFolder(tmp_path, LAYOUT, files={"controlnet": file})
    config = controlnet_config(opened.tensors("controlnet"))
    refiner = "control_noise_refiner" if trained else "control_layers"
    assert config["add_control_noise_refiner"] == refiner
    expected = convert_z_image_controlnet_checkpoint_to_diffusers(dict(tensors), config)

    from mflux.checkpoints.loading import load_component
    from mflux.models.z_image.model.controlnet import ZImageControlNet

    ours = load_component(ZImageControlNet, tmp_path, config=config, tensors=opened.tensors("controlnet"))
    assert flat(ours).keys() == expected.keys()
    assert all(np.array_equal(value, expected[name].numpy()) for name, value in flat(ours).items())


# ---- LoRAs


class Writer:
    """Random tensors of a LoRA file. `changes` are what they amount to, by the transformer's own names."""

    def __init__(self, folder):
        published = load_file(next((folder / "transformer").glob("*.safetensors")))
        self.shapes = {name: tuple(value.shape) for name, value in published.items()}
        self.generator = torch.Generator().manual_seed(4)
        self.tensors: dict[str, torch.Tensor] = {}
        self.changes: dict[str, torch.Tensor] = {}
        self.metadata: dict[str, str] = {}

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator) / shape[-1] ** 0.5

    def record(self, change: torch.Tensor, layers: tuple[str, ...]) -> None:
        for layer, rows in zip(layers, change.chunk(len(layers)), strict=True):
            assert f"{layer}.weight" not in self.changes
            self.changes[f"{layer}.weight"] = rows

    def pair(
        self,
        name: str,
        layers: tuple[str, ...] | str,
        ends: tuple[str, str] = ("lora_A.weight", "lora_B.weight"),
        alpha: float | None = None,
        strength: float = 1.0,
    ) -> None:
        """Factors for a layer, or for several under one name."""
        layers = (layers,) if isinstance(layers, str) else layers
        rank = 3
        height = sum(self.shapes[f"{layer}.weight"][0] for layer in layers)
        width = self.shapes[f"{layers[0]}.weight"][1]
        down, up = self.draw(rank, width), self.draw(height, rank)
        self.tensors |= {f"{name}.{ends[0]}": down, f"{name}.{ends[1]}": up}
        if alpha is not None:
            self.tensors[f"{name}.alpha"] = torch.tensor(alpha)
            strength = alpha / rank
        self.record(strength * up @ down, layers)

    def repeated(self, name: str, parts: tuple[str, ...], ends: tuple[str, str]) -> None:
        """What other names of this file say already: the same rows once more."""
        downs, ups = ([self.tensors[f"{part}.{end}"] for part in parts] for end in ends)
        self.tensors |= {
            f"{name}.{ends[0]}": torch.cat(downs), f"{name}.{ends[1]}": torch.block_diag(*ups),
        }  # fmt: skip

    def difference(self, name: str, parameter: str) -> None:
        change = self.draw(*self.shapes[parameter])
        leaf = "diff_b" if parameter.endswith(".bias") else "diff"
        self.tensors[f"{name}.{leaf}"] = change
        self.changes[parameter] = change


LINEAR = tuple(
    f"{block}.{layer}"
    for block in BLOCKS
    for layer in (*ATTENTION, *FORWARD, "adaLN_modulation.0")
    if not (block.startswith("context") and layer.startswith("adaLN"))
)  # fmt: skip
DOWN_UP = ("lora_down.weight", "lora_up.weight")
DOTTED = ("lora.down.weight", "lora.up.weight")


def own_names(prefix: str, ends=("lora_A.weight", "lora_B.weight"), alpha=None) -> Callable[[Writer], None]:
    def write(file: Writer) -> None:
        for layer in (*LINEAR, *GLOBALS):
            file.pair(prefix + layer, layer, ends, alpha)

    return write


def peft_with_metadata(file: Writer) -> None:
    """As `save_lora_weights` writes it: the alpha beside the tensors, another for some layers."""
    for layer in LINEAR:
        file.pair(f"transformer.{layer}", layer, strength=0.25 if ".w2" in layer else 2.0)
    pattern = {layer: 0.75 for layer in LINEAR if ".w2" in layer}
    settings = {
        "r": 3, "lora_alpha": 6, "alpha_pattern": pattern, "rank_pattern": {}, "target_modules": list(LINEAR),
        "use_rslora": False, "lora_bias": False, "use_dora": False, "exclude_modules": None,
    }  # fmt: skip
    flat = {f"transformer.{name}": value for name, value in settings.items()}
    file.metadata = {"lora_adapter_metadata": json.dumps(flat), "format": "pt"}


def out_without_its_number(file: Writer) -> None:
    for block in BLOCKS:
        for layer in ATTENTION:
            written = layer.replace("to_out.0", "out")
            file.pair(f"diffusion_model.{block}.{written}", f"{block}.{layer}", DOWN_UP, alpha=1.5)


def native(file: Writer) -> None:
    """The modules of a single file, whole changes of norms and biases included."""
    for block in BLOCKS:
        start = f"diffusion_model.{block}"
        file.pair(f"{start}.attention.qkv", tuple(f"{block}.{layer}" for layer in ATTENTION[:3]), DOWN_UP, alpha=2.0)
        file.pair(f"{start}.attention.out", f"{block}.{ATTENTION[3]}", DOWN_UP)
        file.difference(f"{start}.attention.q_norm", f"{block}.attention.norm_q.weight")
        file.difference(f"{start}.attention.k_norm", f"{block}.attention.norm_k.weight")
        for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            file.difference(f"{start}.{norm}", f"{block}.{norm}.weight")
        if not block.startswith("context"):
            file.pair(f"{start}.adaLN_modulation.0", f"{block}.adaLN_modulation.0", DOWN_UP)
            file.difference(f"{start}.adaLN_modulation.0", f"{block}.adaLN_modulation.0.bias")
    for name, layer in {
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        "cap_embedder.1": "cap_embedder.1",
        "t_embedder.mlp.0": "t_embedder.mlp.0",
        "t_embedder.mlp.2": "t_embedder.mlp.2",
    }.items():
        file.pair(f"diffusion_model.{name}", layer, DOWN_UP, alpha=1.0)
        file.difference(f"diffusion_model.{name}", f"{layer}.bias")
    file.difference("diffusion_model.cap_embedder.0", "cap_embedder.0.weight")


def kohya(file: Writer) -> None:
    for layer in LINEAR:
        file.pair(f"lora_unet_{layer.replace('.', '_')}", layer, DOWN_UP, alpha=1.5)


def kohya_globals(file: Writer) -> None:
    for layer in GLOBALS:
        file.pair(f"lora_unet_{layer.replace('.', '_')}", layer, DOWN_UP, alpha=1.5)


def kohya_of_the_authors_modules(file: Writer) -> None:
    for block in BLOCKS:
        start = f"lora_unet_{block.replace('.', '_')}_attention"
        file.pair(f"{start}_qkv", tuple(f"{block}.{layer}" for layer in ATTENTION[:3]), DOWN_UP, alpha=1.5)
        file.pair(f"{start}_out", f"{block}.{ATTENTION[3]}", DOWN_UP, alpha=6.0)


def dotted(*, fused: bool) -> Callable[[Writer], None]:
    """Whose factors have a dot, as have queries, keys and values; what is fused only repeats them."""

    def write(file: Writer) -> None:
        for block in BLOCKS:
            names = [f"{block}.attention.to.{part}" for part in "qkv"]
            for name, layer in zip(names, ATTENTION, strict=False):
                file.pair(name, f"{block}.{layer}", DOTTED)
            file.pair(f"{block}.attention.to_out.0", f"{block}.{ATTENTION[3]}", DOTTED)
            for layer in FORWARD:
                file.pair(f"{block}.{layer}", f"{block}.{layer}", DOTTED)
            if fused:
                file.repeated(f"{block}.attention.qkv", tuple(names), DOTTED)
                file.repeated(f"{block}.attention.out", (f"{block}.attention.to_out.0",), DOTTED)
        # By this diffusers knows that it has to translate.
        file.tensors[f"{BLOCKS[0]}.{FORWARD[0]}.alpha"] = torch.tensor(3.0)

    return write


def dotted_fused_alone(file: Writer) -> None:
    for block in BLOCKS:
        file.pair(f"{block}.attention.qkv", tuple(f"{block}.{layer}" for layer in ATTENTION[:3]), DOTTED, alpha=1.5)
        file.pair(f"{block}.attention.out", f"{block}.{ATTENTION[3]}", DOTTED, alpha=3.0)


# Layout → what writes it, and whether diffusers reads it.
LAYOUTS = {
    "PEFT": (own_names("transformer."), True),
    "PEFT with its settings": (peft_with_metadata, True),
    "no prefix": (own_names(""), False),
    "PEFT's name of an adapter": (own_names("transformer.", ("lora_A.default.weight", "lora_B.default.weight")), False),
    "ai-toolkit": (own_names("diffusion_model."), True),
    "ai-toolkit with alpha": (own_names("diffusion_model.", alpha=1.5), True),
    "ComfyUI, the published names": (own_names("diffusion_model.", DOWN_UP, alpha=1.5), True),
    "ComfyUI, out": (out_without_its_number, True),
    "ComfyUI, a single file's modules": (native, False),
    "kohya": (kohya, True),
    "kohya, what is around the blocks": (kohya_globals, False),
    "kohya, the authors' modules": (kohya_of_the_authors_modules, True),
    "dotted": (dotted(fused=False), True),
    "dotted, with what is fused beside": (dotted(fused=True), True),
    "dotted, what is fused alone": (dotted_fused_alone, True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora(folder, tmp_path, layout):
    write, reads = LAYOUTS[layout]
    file = Writer(folder)
    write(file)
    path = tmp_path / "lora.safetensors"
    save_file({name: value.contiguous() for name, value in file.tensors.items()}, path, metadata=file.metadata or None)
    assert len(file.changes) >= len(GLOBALS)

    before = flat(z_image(folder).transformer)
    ours = flat(z_image(folder, lora_paths=[str(path)], lora_scales=[SCALE]).transformer)
    for name, value in before.items():
        if name in file.changes:
            assert relative_error(ours[name] - value, SCALE * file.changes[name]) <= 1e-5, name
        else:
            assert np.array_equal(ours[name], value), name
    if not reads:
        return
    reference = pipeline_reference.__wrapped__(folder, "ZImagePipeline")
    reference.load_lora_weights(str(path))
    reference.fuse_lora(lora_scale=SCALE)
    theirs = {
        name.replace(".base_layer", ""): value.detach().numpy()
        for name, value in reference.transformer.state_dict().items()
        if "lora_" not in name
    }
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert relative_error(ours[name], value) <= 1e-6, name

"""SeedVR2: what tests need to know of it.

No package has its reference, so nothing here runs beside the tests' references: what that one computes lies in
tests/data/seedvr2, and test_networks.py compares with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mflux.backend import mx, nn
from mflux.checkpoints.loading import load_component
from mflux.checkpoints.readers.safetensors import SafetensorsFile
from mflux.models.seedvr2.model.autoencoder import SeedVR2Autoencoder
from mflux.models.seedvr2.model.transformer import SeedVR2Transformer

DATA = Path(__file__).parents[2] / "data" / "seedvr2"
TRANSFORMERS = ("transformer_3b", "transformer_3b_separate", "transformer_7b")
AUTOENCODERS = ("autoencoder", "autoencoder_other")


class Data:
    """One file of what the reference computed.

    Attributes:
        config: what `config.json` would say.
        weights, inputs, outputs: arrays by name; the inputs in float32.
    """

    def __init__(self, name: str):
        self.name = name
        file = SafetensorsFile(DATA / f"{name}.safetensors")
        self.config = json.loads(file.metadata["config"])
        self.weights, self.inputs, self.outputs = (
            {name.removeprefix(part): file[name] for name in file if name.startswith(part)}
            for part in ("weights/", "inputs/", "outputs/")
        )
        self.inputs = {name: value.astype(mx.float32) for name, value in self.inputs.items()}

    def module(self, dtype: mx.Dtype = mx.float32) -> nn.Module:
        """Ours, with these weights. What is added up of them while they load is not rounded to what the file holds."""
        module_class = SeedVR2Transformer if self.name in TRANSFORMERS else SeedVR2Autoencoder
        weights = {name: value.astype(dtype) for name, value in self.weights.items()}
        return load_component(module_class, DATA / self.name, dtype=dtype, config=self.config, tensors=weights)


def whole_model() -> dict[str, tuple[dict[str, Any], dict[str, mx.array]]]:
    """Configuration and weights of the model that drew whole.safetensors, by component; its text has the published
    width, for which the text's layer is repeated."""
    transformer, autoencoder = Data("transformer_3b"), Data("autoencoder")
    weights = dict(transformer.weights)
    weights["txt_in.weight"] = mx.tile(weights["txt_in.weight"], (1, 256)) / 16
    return {
        "transformer": (transformer.config | {"txt_in_dim": 5120}, weights),
        "vae": (autoencoder.config, autoencoder.weights),
    }


def write_folder(folder: Path, parts: Mapping[str, tuple[Mapping[str, Any], Mapping[str, mx.array]]]) -> Path:
    """Write components as a model in folders, from their configurations and published tensors."""
    from support.tiny import write_json

    for name, (config, tensors) in parts.items():
        write_json(folder / name / "config.json", dict(config))
        path = folder / name / "diffusion_pytorch_model.safetensors"
        mx.save_safetensors(str(path), dict(tensors), metadata={"format": "pt"})
    return folder


def tiny_configs(*, wide: bool = False, kind: str = "3b") -> dict[str, dict[str, Any]]:
    """Configurations of a small model; wide: rows of 64 and its multiples, so that nearly every layer is quantized."""
    dim = 64 if wide else 24
    transformer = {
        "vid_dim": dim, "txt_dim": dim, "emb_dim": 6 * dim, "heads": 2, "head_dim": 32, "num_layers": 3, "mm_layers": 1,
        "rope_dim": 32, "vid_in_channels": 9, "vid_out_channels": 4,
    }  # fmt: skip
    if kind == "7b":
        transformer |= {
            "mm_layers": 3, "rope_dim": 16, "rope_type": None, "vid_out_norm": None, "mlp_type": "normal",
        }  # fmt: skip
    vae = {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 32}
    return {"transformer": transformer, "vae": vae}


def write_tiny(folder: Path, *, wide: bool = False, kind: str = "3b") -> Path:
    """A model of random weights in folders, which takes the constant text as it is."""
    from support.tiny import published

    parts = {}
    classes = {"transformer": SeedVR2Transformer, "vae": SeedVR2Autoencoder}
    for number, (name, config) in enumerate(tiny_configs(wide=wide, kind=kind).items()):
        module = classes[name](classes[name].config_class.from_dict(config))
        parts[name] = config, published(module, seed=number)
    return write_folder(folder, parts)

"""Adapters of PEFT's own, written by it, beside what is read of their files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file

from mflux.backend import mx, nn
from mflux.models.common.lora.adapters import LoraLinear
from mflux.models.common.lora.names import Spelling
from mflux.models.common.lora.reading import Loras

SIZES = {"square": (32, 32), "wide": (48, 24), "tall": (20, 64)}
CONFIGS = {
    "LoRA": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(SIZES)),
    "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=list(SIZES)),
    "rsLoRA": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=list(SIZES)),
    "LoHa": lambda: peft.LoHaConfig(r=2, alpha=5, target_modules=list(SIZES)),
    "LoHa of a high rank": lambda: peft.LoHaConfig(r=9, alpha=5, target_modules=list(SIZES)),
    "LoKr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=list(SIZES)),
}


class Theirs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, (height, width) in SIZES.items():
            setattr(self, name, torch.nn.Linear(width, height))


class Ours(nn.Module):
    def __init__(self):
        super().__init__()
        for name, (height, width) in SIZES.items():
            setattr(self, name, nn.Linear(width, height))


def load(theirs: Theirs, adjust=None) -> Ours:
    ours = Ours()
    for name, value in theirs.items():
        array = mx.array(value.numpy())
        ours.load_weights([(name, array if adjust is None else adjust(name, array))], strict=False)
    return ours


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("bake", [True, False])
def test_what_peft_computes(kind, bake, tmp_path):
    torch.manual_seed(1)
    model = Theirs()
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, CONFIGS[kind]())
    for name, value in wrapped.named_parameters():
        if value.requires_grad:
            # Many begin as zeros.
            value.data += 0.3 * torch.randn_like(value) * (value.abs().mean() if "magnitude" in name else 1)
    wrapped.eval()
    path = written(wrapped, tmp_path)
    loras = Loras([path], [1.0], spellings=[Spelling("x")], layouts={}, modules={"x": Ours()})
    ours = loras.apply("x", lambda adjust: load(stored, adjust), bake=bake)
    for name, (_, width) in SIZES.items():
        assert isinstance(ours[name], LoraLinear) is not bake
        x = torch.randn(3, width)
        with torch.no_grad():
            want = getattr(wrapped.base_model.model, name)(x).numpy()
            before = torch.nn.functional.linear(x, stored[f"{name}.weight"], stored[f"{name}.bias"]).numpy()
        got = np.array(ours[name](mx.array(x.numpy())))
        assert np.abs(want - before).max() > 0.05
        assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def written(model: peft.PeftModel, folder: Path) -> Path:
    tensors = peft.get_peft_model_state_dict(model)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    config = model.peft_config["default"].to_dict()
    plain = {name: value for name, value in config.items() if isinstance(value, (int, float, str, bool, dict))}
    (folder / "adapter_config.json").write_text(json.dumps(plain, default=str))
    return folder / "adapter_model.safetensors"

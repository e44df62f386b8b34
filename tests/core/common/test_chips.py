"""What is done on one chip and not on another."""

from __future__ import annotations

import numpy as np
import pytest
from support.graph import way_of_a_gpu

from mflux import chips
from mflux.backend import mx, nn
from mflux.checkpoints.quantization import QuantizedLinear

M1, M2, M3, OTHER = "applegpu_g13s", "applegpu_g14d", "applegpu_g15s", "sm_90"


def on(monkeypatch, architecture: str) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})


@pytest.mark.parametrize(("architecture", "rules"), [(M1, 2), (M2, 2), (M3, 0), (OTHER, 0), ("", 0)])
def test_which_rules_apply(monkeypatch, architecture, rules):
    on(monkeypatch, architecture)
    with way_of_a_gpu():
        assert chips.told() == [rule.does for rule in chips.RULES][:rules]
    assert chips.told() == [], "on a CPU"
    assert all(rule.source and rule.chips for rule in chips.RULES)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("architecture", "rows", "unpacks"), [(M1, 512, True), (M2, 700, True), (M1, 511, False), (M3, 512, False)]
)
def test_products_of_many_rows(monkeypatch, architecture, rows, unpacks, bits, bias):
    layer = QuantizedLinear.from_linear(nn.Linear(128, 48, bias=bias), 64, bits)
    x = mx.random.normal((1, rows, 128), key=mx.random.key(1))
    plain = nn.QuantizedLinear.__call__(layer, x)
    on(monkeypatch, architecture)
    unpacked: list[bool] = []
    real = mx.dequantize
    monkeypatch.setattr(mx, "dequantize", lambda *args, **more: unpacked.append(True) or real(*args, **more))
    with way_of_a_gpu():
        found = layer(x)
    assert bool(unpacked) is unpacks
    assert np.allclose(np.array(found), np.array(plain), atol=1e-4)

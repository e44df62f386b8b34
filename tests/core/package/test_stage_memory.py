"""benchmarks/stage_memory.py: what it counts, and that the tables which quote it are true."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from mflux.backend import mx, nn
from mflux.checkpoints.loading import load_component
from mflux.models.common.footprint import weights

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

import stage_memory  # noqa: E402


class Layers(nn.Module):
    least_bits = {"fine": 8}

    def __init__(self, *_):
        super().__init__()
        self.fine = nn.Linear(64, 32, bias=False)
        self.coarse = nn.Linear(64, 32)
        self.narrow = nn.Linear(48, 32, bias=False)


@pytest.mark.parametrize(
    ("bits", "fine", "coarse"),
    # A group of 64 has a scale and an offset of 16 bits each.
    [(None, 32 * 128, 32 * 128), (8, 32 * 68, 32 * 68), (4, 32 * 68, 32 * 36)],
)
def test_what_parameters_take(bits, fine, coarse):
    assert weights(Layers(), bits) == fine + coarse + 2 * 32 + 32 * 96


def test_it_counts_what_loading_holds(tmp_path):
    """Of a module in 16 bits."""
    from families.z_image.cases import write_tiny

    from mflux.models.common.memory import weight_bytes
    from mflux.models.z_image.model.transformer import ZImageTransformer

    folder = write_tiny(tmp_path / "model", wide=True) / "transformer"
    plain = load_component(ZImageTransformer, folder, dtype=mx.bfloat16)
    for bits in (None, 8, 4):
        loaded = load_component(ZImageTransformer, folder, dtype=mx.bfloat16, quantize=bits)
        assert weight_bytes(loaded) == weights(plain, bits)


def test_the_published_table_is_true():
    lines = (ROOT / "benchmarks" / "stages.md").read_text(encoding="utf-8").splitlines()
    quoted = [tuple(cell.strip() for cell in line.strip("| ").split("|")) for line in lines if "/" in line[:40]]
    quoted = [row for row in quoted if re.match(r"[\w.-]+/", row[0]) and len(row) == 6]
    assert len(quoted) >= 20
    from mflux.models.common.family import families

    counted = {row for name, family in families().items() if family.pipelines for row in stage_memory.on_paper(name)}
    assert set(quoted) <= counted


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        (
            "qwen",
            {
                "text encoder, to draw": "Qwen-Image/text_encoder (Qwen2.5-VL-7B) (Qwen25VLTextEncoder)",
                "text encoder, to edit": "Qwen-Image/text_encoder (Qwen2.5-VL-7B) (Qwen25VLEncoder)",
                "transformer": "Qwen-Image/transformer (QwenTransformer)",
                "autoencoder": "Qwen-Image/vae (AutoencoderWan)",
            },
        ),
        (
            "z_image",
            {
                "text encoder": "Z-Image/text_encoder (ZImageTextEncoder)",
                "transformer": "Z-Image/transformer (ZImageTransformer)",
            },
        ),
        (
            "krea2",
            {
                "text encoder": "Krea-2/text_encoder (Qwen3-VL-4B) (Krea2TextEncoder)",
                "transformer": "Krea-2/transformer (Krea2Transformer)",
                "with its depth ControlNet": "Krea-2/transformer (Krea2ControlTransformer)",
            },
        ),
        (
            "ernie_image",
            {
                "text encoder": "ERNIE-Image/text_encoder (ErnieTextEncoder)",
                "transformer": "ERNIE-Image/transformer (ErnieTransformer)",
                "autoencoder": "ERNIE-Image/vae (ErnieAutoencoder)",
            },
        ),
        (
            "ideogram4",
            {
                "text encoder": "ideogram-4/text_encoder (Qwen3-VL-8B) (Ideogram4TextEncoder)",
                "one transformer, of two": "ideogram-4/transformer (Ideogram4Transformer)",
            },
        ),
    ],
)
def test_a_family_s_own_table_is_true(family, rows):
    counted = {row[0]: list(row[3:]) for row in stage_memory.on_paper(family)}
    text = (ROOT / "src" / "mflux" / "models" / family / "README.md").read_text(encoding="utf-8")
    quoted = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if line.startswith("| ") and len(cells) == 4 and re.fullmatch(r"[\d.]+", cells[1]):
            # The first table; what was measured stands below.
            quoted.setdefault(cells[0].partition(" (")[0], cells[1:])
    for label, key in rows.items():
        assert quoted[label] == counted[key], label

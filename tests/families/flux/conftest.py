"""Fixtures of the tests that compare FLUX.1 with the reference implementations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def published() -> dict:
    """Configurations and parameter counts of published models, by model and component."""
    entries = json.loads((Path(__file__).parents[2] / "data" / "surface" / "configs.json").read_text())

    def entry(model: str, part: str) -> dict:
        config = entries.get(f"{model}/{part}") or entries[f"FLUX.1/{part}"]
        found = {"config": {name: value for name, value in config.items() if name != "_parameters"}}
        return found | ({"parameters": config["_parameters"]} if "_parameters" in config else {})

    parts = ("text_encoder", "text_encoder_2", "transformer", "vae", "scheduler")
    return {model: {part: entry(model, part) for part in parts} for model in ("FLUX.1-schnell", "FLUX.1-dev")}


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory) -> dict[str, Path]:
    """Two whole FLUX.1 folders of random weights, as unlike as the format allows; not to be written to."""
    from support.reference import write_flux

    root = tmp_path_factory.mktemp("flux")
    return {
        "plain": write_flux(root / "plain", seed=10),
        "guided": write_flux(
            root / "guided",
            seed=20,
            guidance=True,
            scheduler="dynamic",
            eos_token_id=2,
            heads=3,
            layers=(2, 1),
            text_width=32,
            pooled_width=28,
            t5_form="strip",
            layers_per_block=2,
            block_out_channels=[4, 8, 8, 16],
            norm_num_groups=2,
            use_quant_conv=True,
            use_post_quant_conv=True,
            mid_block_add_attention=False,
        ),
    }

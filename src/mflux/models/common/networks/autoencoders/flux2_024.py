"""FLUX.2's autoencoder in other layouts: folders that mflux 0.24 or earlier saved, and the authors' single file."""

from __future__ import annotations

import re
from typing import Any

from mflux.checkpoints.renamed import Names, Patterns, Renamed, where
from mflux.models.common.networks.autoencoders import kl_024

NAMES: Patterns = ((r"(\.attentions\.\d+\.to_out)\.", r"\1.0."),)
SINGLE_FILE: Names = where(
    r"^decoder\.up\.\d",
    lambda names: {
        re.sub(r"^(en|de)coder\.((post_)?quant_conv)\.", r"\2.", name): place
        for name, place in (kl_024.SINGLE_FILE(names) or {}).items()
    },
)


def config(tensors: Renamed) -> dict[str, Any]:
    """What the shapes tell, and what all FLUX.2's have in common."""
    return kl_024.shape(tensors) | {
        "_class_name": "AutoencoderKLFlux2",
        "batch_norm_eps": 1e-4,
        "patch_size": [2, 2],
    }

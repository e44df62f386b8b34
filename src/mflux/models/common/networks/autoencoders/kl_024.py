"""The KL autoencoder in folders that mflux 0.24 or earlier saved, of FLUX.1, FLUX.2 and Z-Image."""

from __future__ import annotations

from typing import Any

from mflux.checkpoints.renamed import Patterns, Renamed

NAMES: Patterns = ((r"\.(conv_in|conv_out)\.conv2d\.", r".\1."), (r"\.conv_norm_out\.norm\.", ".conv_norm_out."))
SQUARE = (("decoder.mid_block.attentions.0.to_q", "decoder.mid_block.attentions.0.to_q.bias"),)


def config(tensors: Renamed) -> dict[str, Any]:
    """As FLUX.1 has it, whose scale no shape tells."""
    return shape(tensors) | {"_class_name": "AutoencoderKL", "scaling_factor": 0.3611, "shift_factor": 0.1159}


def shape(tensors: Renamed) -> dict[str, Any]:
    """What the shapes tell of an autoencoder of KL's kind."""
    levels = tensors.count(r"encoder\.down_blocks\.(\d+)\.")
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors.rows("decoder.conv_out.bias"),
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [
            tensors.rows(f"encoder.down_blocks.{level}.resnets.0.conv1.bias") for level in range(levels)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": tensors.count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "norm_num_groups": 32,
        "act_fn": "silu",
        "mid_block_add_attention": True,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }

"""Smaller components that may take the place of FLUX.2 klein's own: a text encoder with an adapter, and a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mflux.backend import mx
from mflux.checkpoints.folders import read_json
from mflux.checkpoints.loading import FolderTensors, load_component
from mflux.checkpoints.readers.safetensors import SafetensorsFile
from mflux.checkpoints.stored.opened import Joined
from mflux.errors import CheckpointError
from mflux.hub import fetch_file, resolve_model
from mflux.models.flux2.model.text_encoder import (
    KleinTextEncoder,
    SmallQwen3,
    SmallTextAdapter,
    SmallTextEncoder,
)
from mflux.text import shown

ENCODER = "Qwen/Qwen3-0.6B"
ADAPTER, ADAPTER_FILE = "AiArtLab/qwen3-0.6b-4b-adapter", "adapter_v14_bal.safetensors"
DECODER, DECODER_FILE = "black-forest-labs/FLUX.2-small-decoder", "diffusion_pytorch_model.safetensors"
# What the adapter makes up for: klein 4B's prompt embeds are so wide.
PROMPT_EMBEDS = 7680
# What the decoder's file is taken for: its encoder is the model's own, and so are the statistics.
_DECODING = ("decoder.", "post_quant_conv.")


def text_encoder_folders() -> tuple[Path, Path]:
    """The folder of the small encoder and the adapter's file, downloaded if need be.

    Raises:
        DownloadError: one of them cannot be had.
    """
    folder = resolve_model(ENCODER, ["config.json", "model.safetensors"], required=["config.json", "model.safetensors"])
    return folder, fetch_file(ADAPTER, ADAPTER_FILE)


def load_text_encoder(folder: Path, adapter_file: Path, *, quantize: int | None = None) -> SmallTextEncoder:
    """The small text encoder; `quantize` is for the encoder, not for its adapter.

    Raises:
        CheckpointError: the adapter is another than the one that is built, or a file is damaged.
    """
    encoder = load_component(SmallQwen3, folder, quantize=quantize)
    file = SafetensorsFile(adapter_file)
    settings = _adapter_settings(file.metadata, adapter_file)
    adapter = load_component(
        SmallTextAdapter,
        adapter_file.parent,
        dtype=mx.float32,
        config=settings | {"hidden_size": encoder.config.hidden_size},
        tensors=file,
    )
    return SmallTextEncoder(encoder, adapter, left_out=int(file.metadata["drop_first"]))


def _adapter_settings(metadata: Mapping[str, str], source: Path) -> dict[str, Any]:
    """What a configuration would say, from what the file says of itself."""
    states = {"student_layers": SmallQwen3.hidden_states, "teacher_layers": KleinTextEncoder.hidden_states}
    built = {name: ",".join(map(str, numbers)) for name, numbers in states.items()}
    built |= {"norm": "ln-per-layer", "proj_layers": "3"}
    for name, value in built.items():
        if metadata.get(name) != value:
            raise CheckpointError(
                f"{source} is an adapter with {name} {metadata.get(name)!r}, and only {value!r} is built: leave "
                "--small-text-encoder out"
            )
    try:
        if not 0 <= int(metadata["drop_first"]) < int(metadata["len"]):
            raise ValueError("drop_first")
        return {
            "hidden_states": len(SmallQwen3.hidden_states),
            "out_features": PROMPT_EMBEDS,
            "mlp_features": int(metadata["hidden"]),
            "attention_features": int(metadata["attn_dim"]),
            "attention_heads": int(metadata["attn_heads"]),
            "attention_blocks": int(metadata["attention"]),
            "max_length": int(metadata["len"]),
        }
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{source} does not say what it is made of ({shown(error, 100)} makes no sense or is missing): fetch it "
            "again, or leave --small-text-encoder out"
        ) from None


def decoder_folder() -> Path:
    """The folder of the small decoder, downloaded if need be.

    Raises:
        DownloadError: it cannot be had.
    """
    return resolve_model(DECODER, ["config.json", DECODER_FILE], required=["config.json", DECODER_FILE])


def with_small_decoder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, mx.array]
) -> tuple[dict[str, Any], Mapping[str, mx.array]]:
    """An autoencoder's configuration and tensors with the small decoder in the place of its own.

    Args:
        folder: see `decoder_folder`.
        config, tensors: the model's own autoencoder.
    """
    small = FolderTensors(folder, [folder / DECODER_FILE])
    channels = read_json(folder / "config.json").get("decoder_block_out_channels")
    if channels is None:
        raise CheckpointError(f"{folder} holds no small decoder: its config.json names no decoder_block_out_channels")
    where = {name: tensors for name in tensors if not name.startswith(_DECODING)}
    where |= {name: small for name in small if name.startswith(_DECODING)}
    return dict(config) | {"decoder_block_out_channels": channels}, Joined(where)

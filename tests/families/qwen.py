"""Qwen-Image and Qwen-Image-Edit: what the tests of all families need to know of them."""

from __future__ import annotations

import numpy as np

from families.cases import Component
from mflux.backend import mx
from mflux.models.common.autoencoders.wan import AutoencoderWan


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- autoencoder


def small_vae(**settings) -> dict:
    small = dict(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True]) | settings
    depth = small["z_dim"]
    return small | {"latents_mean": normal(5, depth).tolist(), "latents_std": (1 + np.arange(depth) / 3).tolist()}


def vae_reference(**settings):
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(**small_vae(**settings))


def wan_reference(**settings):
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**small_vae(**settings))


def vae_inputs(model, number: int) -> dict:
    batch, height, width = ((1, 24, 40), (3, 32, 16))[number]
    shrink = 2 ** (len(model.config.dim_mult) - 1)
    channels = model.config.get("input_channels") or model.config.in_channels
    return {
        "image": np.tanh(normal(1, batch, channels, height, width)),
        "latents": normal(2, batch, model.config.z_dim, height // shrink, width // shrink),
    }


def run_vae(module, inputs):
    yield module.encode(mx.array(inputs["image"]))
    yield module.decode(mx.array(inputs["latents"]))


def run_vae_reference(model, inputs):
    import torch

    mean, std = (
        torch.tensor(values)[:, None, None] for values in (model.config.latents_mean, model.config.latents_std)
    )
    encoded = model.encode(torch.tensor(inputs["image"])[:, :, None]).latent_dist.mode()[:, :, 0]
    latents = torch.tensor(inputs["latents"]) * std + mean
    return [(encoded - mean) / std, model.decode(latents[:, :, None]).sample[:, :, 0]]


def vae_full_size(config):
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage.from_config(config)


def same_sum_in_a_resnet(first: str, second: str) -> bool:
    """A residual block adds its last convolution to its shortcut, and with them their biases."""
    blocks = {name.removesuffix(".conv2.bias").removesuffix(".conv_shortcut.bias") for name in (first, second)}
    ends = {name.rpartition(".")[0].rpartition(".")[2] for name in (first, second)}
    return len(blocks) == 1 and ends == {"conv2", "conv_shortcut"} and first.endswith("bias")


_VAE = dict(
    module=AutoencoderWan,
    inputs=vae_inputs,
    ours=run_vae,
    theirs=run_vae_reference,
    gains={"decoder.conv_out.weight": 0.3},
    ignored=(".time_conv.weight", ".time_conv.bias"),
    neutral=(same_sum_in_a_resnet,),
)

COMPONENTS = (
    Component(
        name="vae",
        reference=vae_reference,
        settings={
            "as Qwen-Image's": dict(
                dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True], z_dim=16
            ),
            "three levels": dict(dim_mult=[2, 1, 3], temperal_downsample=[True, False], z_dim=3),
            "one level, grey": dict(dim_mult=[3], temperal_downsample=[], input_channels=1, num_res_blocks=3),
        },
        published={"Qwen-Image/vae": 126_892_531},
        full_size=vae_full_size,
        swap=dict(base_dim=4, dim_mult=[1, 2], z_dim=4),
        neutral_pairs=1,
        **_VAE,
    ),
    Component(
        name="vae of Wan 2.1",
        reference=wan_reference,
        settings={
            "another decoder width": dict(decoder_base_dim=12),
            "other channels at the ends": dict(in_channels=2, out_channels=4),
        },
        **_VAE,
    ),
)

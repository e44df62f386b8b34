"""FIBO: what the tests of all families need to know of it."""

from __future__ import annotations

import numpy as np

from families.cases import Component
from families.flux import normal, token_ids
from families.qwen import run_vae, run_vae_reference, same_sum_in_a_resnet
from mflux.backend import mx
from mflux.models.common.mmdit import latent_image_ids
from mflux.models.common.text_encoders.smollm3 import SmolLM3TextEncoder
from mflux.models.fibo.model.autoencoder import FiboAutoencoder
from mflux.models.fibo.model.transformer import FiboTransformer

# ---- text encoder

_SMOLLM3 = dict(
    vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2, rope_theta=5_000_000.0,
)  # fmt: skip


def smollm3_reference(**settings):
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    return SmolLM3ForCausalLM(SmolLM3Config(**_SMOLLM3 | settings))


def smollm3_inputs(model, number: int) -> dict:
    """Prompts of different lengths, or all of one."""
    batch, length = ((3, 11), (1, 37))[number]
    mask = np.ones((batch, length), dtype=np.int64)
    for row in range(batch):
        mask[row, length - 4 * row :] = 0 if row else 1
    return {"ids": token_ids(batch, length, model.config.vocab_size), "mask": mask}


def run_smollm3(module, inputs):
    mask = None if inputs["mask"].all() else mx.array(inputs["mask"])
    kept = mx.array(inputs["mask"])[..., None]
    return [state * kept for state in module(mx.array(inputs["ids"]), mask)]


def run_smollm3_reference(model, inputs):
    """Every hidden state; what stands at padding means nothing and is taken out on both sides."""
    import torch

    mask = torch.tensor(inputs["mask"])
    result = model(torch.tensor(inputs["ids"]), attention_mask=mask, output_hidden_states=True)
    return [state * mask[..., None] for state in result.hidden_states]


def smollm3_full_size(config):
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    return SmolLM3ForCausalLM(SmolLM3Config(**config))


# ---- transformer

_TRANSFORMER = dict(
    in_channels=6, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, text_encoder_dim=12, axes_dims_rope=[4, 6, 6],
)  # fmt: skip


def transformer_reference(**settings):
    from diffusers import BriaFiboTransformer2DModel

    settings = _TRANSFORMER | settings
    return BriaFiboTransformer2DModel(**settings | {"joint_attention_dim": 2 * settings["text_encoder_dim"]})


def transformer_inputs(model, number: int) -> dict:
    """Rows of different lengths: the reference pads them to the longest and masks the padding."""
    batch, rows, columns, layers = ((1, 3, 5, 6), (3, 6, 2, 3))[number]
    config = model.config
    longest = 7 + batch
    states = normal(2, layers, batch, longest, config.text_encoder_dim)
    lengths = [longest - 3 * row for row in range(batch)]
    for row, length in enumerate(lengths):
        states[:, row, length:] = 0
    return {
        "latents": normal(1, batch, rows * columns, config.in_channels),
        "states": states,
        "lengths": lengths,
        "sigma": [0.9, 0.55, 0.3][:batch],
        "grid": (rows, columns),
    }


def run_transformer(module, inputs):
    """Row by row, each in its own length."""
    rows = []
    for row, length in enumerate(inputs["lengths"]):
        text = module.project_text([mx.array(layer[row : row + 1, :length]) for layer in inputs["states"]])
        prediction = module(
            mx.array(inputs["latents"][row : row + 1]),
            sigma=mx.array(inputs["sigma"][row : row + 1]),
            text=text,
            image_ids=latent_image_ids(*inputs["grid"]),
        )
        rows.append(prediction)
    return [mx.concatenate(rows)]


def run_transformer_reference(model, inputs):
    import torch
    from diffusers import FluxPipeline

    states = [torch.tensor(layer) for layer in inputs["states"]]
    blocks = model.config.num_layers + model.config.num_single_layers
    # As BriaFiboPipeline chooses them.
    layers = states[-blocks:] if len(states) >= blocks else states + [states[-1]] * (blocks - len(states))
    batch, longest = states[0].shape[:2]
    rows, columns = inputs["grid"]
    mask = torch.zeros(batch, longest + rows * columns, dtype=torch.bool)
    mask[:, longest:] = True
    for row, length in enumerate(inputs["lengths"]):
        mask[row, :length] = True
    prediction = model(
        hidden_states=torch.tensor(inputs["latents"]),
        encoder_hidden_states=torch.cat([states[-1], states[-2]], dim=-1),
        text_encoder_layers=layers,
        timestep=1000 * torch.tensor(inputs["sigma"]),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32),
        txt_ids=torch.zeros(longest, 3),
        joint_attention_kwargs={"attention_mask": mask[:, None, None]},
    )
    return [prediction.sample]


def transformer_full_size(config):
    from diffusers import BriaFiboTransformer2DModel

    return BriaFiboTransformer2DModel.from_config(config)


# ---- autoencoder


def vae_reference(**settings):
    from diffusers import AutoencoderKLWan

    small = dict(
        base_dim=4, decoder_base_dim=8, z_dim=6, dim_mult=[1, 2, 2], num_res_blocks=1,
        temperal_downsample=[False, True], is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=8,
    ) | settings  # fmt: skip
    depth = small["z_dim"]
    return AutoencoderKLWan(
        **small, latents_mean=normal(5, depth).tolist(), latents_std=(1 + np.arange(depth) / 3).tolist()
    )


def vae_inputs(model, number: int) -> dict:
    batch, rows, columns = ((1, 3, 5), (3, 4, 2))[number]
    patch = model.config.patch_size
    pixels = patch * 2 ** (len(model.config.dim_mult) - 1)
    channels = model.config.in_channels // patch**2
    return {
        "image": np.tanh(normal(1, batch, channels, pixels * rows, pixels * columns)),
        "latents": normal(2, batch, model.config.z_dim, rows, columns),
    }


def vae_full_size(config):
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_config(config)


COMPONENTS = (
    Component(
        name="vae",
        module=FiboAutoencoder,
        reference=vae_reference,
        settings={
            "one level over time": dict(),
            "as published, narrow": dict(dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True]),
            "first level over time": dict(temperal_downsample=[True, False], num_res_blocks=2, decoder_base_dim=None),
            "patches of three, grey": dict(patch_size=3, in_channels=9, out_channels=9, dim_mult=[2, 1, 1]),
        },
        inputs=vae_inputs,
        ours=run_vae,
        theirs=run_vae_reference,
        gains={"decoder.conv_out.weight": 0.2},
        published={"FIBO/vae (Wan 2.2)": 704_688_668},
        full_size=vae_full_size,
        ignored=(".time_conv.weight", ".time_conv.bias"),
        swap=dict(dim_mult=[2, 1], temperal_downsample=[True], decoder_base_dim=4),
        neutral=(same_sum_in_a_resnet,),
        neutral_pairs=3,
    ),
    Component(
        name="text_encoder",
        module=SmolLM3TextEncoder,
        reference=smollm3_reference,
        settings={
            "every fourth layer without positions": dict(),
            "every layer rotated": dict(no_rope_layers=[1] * 6, num_key_value_heads=4, rope_theta=10_000.0),
            "a list, with biases": dict(no_rope_layers=[0, 1, 0, 1], num_hidden_layers=4, attention_bias=True),
            "every second, heads of their own width": dict(no_rope_layer_interval=2, head_dim=10, hidden_size=20),
        },
        inputs=smollm3_inputs,
        ours=run_smollm3,
        theirs=run_smollm3_reference,
        published={"FIBO/text_encoder (SmolLM3-3B)": 3_075_098_624},
        full_size=smollm3_full_size,
        swap=dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=4),
    ),
    Component(
        name="transformer",
        module=FiboTransformer,
        reference=transformer_reference,
        settings={
            "both kinds of blocks": dict(),
            "only double blocks": dict(num_single_layers=0, num_layers=4, text_encoder_dim=10),
            "only single blocks": dict(num_layers=0, num_single_layers=5, num_attention_heads=3),
            "other axes": dict(attention_head_dim=20, axes_dims_rope=[2, 8, 10], rope_theta=300, in_channels=5),
        },
        inputs=transformer_inputs,
        ours=run_transformer,
        theirs=run_transformer_reference,
        published={"FIBO/transformer": 8_285_836_848},
        full_size=transformer_full_size,
        swap=dict(
            in_channels=16, attention_head_dim=8, axes_dims_rope=[2, 2, 4], text_encoder_dim=8, num_layers=1,
            num_single_layers=2,
        ),
    ),
)  # fmt: skip

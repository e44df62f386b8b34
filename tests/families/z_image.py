"""Z-Image: what the tests of all families need to know of it."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory

import numpy as np

from families.cases import Component
from families.flux import normal, token_ids
from mflux.backend import mx
from mflux.checkpoints.loading import load_component
from mflux.models.z_image.model.controlnet import ZImageControlNet
from mflux.models.z_image.model.text_encoder import ZImageTextEncoder
from mflux.models.z_image.model.transformer import ZImageTransformer

# ---- text encoder


def text_encoder_reference(**settings):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    defaults = dict(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(Qwen3Config(**defaults | settings))


def text_encoder_inputs(model, number: int) -> dict:
    batch, length = ((1, 9), (3, 14))[number]
    mask = np.ones((batch, length), np.int32)
    for row in range(batch):
        mask[row, length - 2 * row - number :] = 0
    return {"ids": token_ids(batch, length, model.config.vocab_size), "mask": mask}


def run_text_encoder(module, inputs):
    states = module(mx.array(inputs["ids"]), mx.array(inputs["mask"]))
    # What stands at padding reaches nothing.
    return [state * mx.array(inputs["mask"])[..., None] for state in states]


def run_text_encoder_reference(model, inputs):
    import torch

    ids, mask = torch.tensor(inputs["ids"]), torch.tensor(inputs["mask"])
    states = model(ids, attention_mask=mask.bool(), output_hidden_states=True).hidden_states
    return [states[-2] * mask[..., None]]


def text_encoder_full_size(config):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**config))


# ---- transformer

_SMALL = dict(
    dim=48, n_heads=3, n_kv_heads=3, axes_dims=[4, 6, 6], axes_lens=[256, 64, 64], n_layers=3, n_refiner_layers=2,
    in_channels=4, cap_feat_dim=20,
)  # fmt: skip


def transformer_reference(**settings):
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(**_SMALL | settings)


def transformer_inputs(model, number: int) -> dict:
    # A caption and a picture that have to be filled up to 32 tokens, and others that have not.
    batch, rows, columns, length = ((1, 3, 5, 7), (3, 8, 4, 32))[number]
    config = model.config
    patch = config.all_patch_size[0]
    return {
        "latents": normal(1, batch, config.in_channels, patch * rows, patch * columns),
        "prompt_embeds": normal(2, batch, length, config.cap_feat_dim),
        "timestep": np.linspace(0.1, 0.7, batch, dtype=np.float32),
    }


def run_transformer(module, inputs):
    arrays = {name: mx.array(value) for name, value in inputs.items()}
    return [module(arrays.pop("latents"), **arrays)]


def run_transformer_reference(model, inputs):
    import torch

    samples = model(
        [torch.tensor(latents)[:, None] for latents in inputs["latents"]],
        torch.tensor(inputs["timestep"]),
        [torch.tensor(embeds) for embeds in inputs["prompt_embeds"]],
        patch_size=model.config.all_patch_size[0],
    )
    return [torch.stack(samples.sample)[:, :, 0]]


def transformer_full_size(config):
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel.from_config(config)


# ---- ControlNet: embedders and refiners are those of a transformer, the same for the reference and for us

_BORROWED = ("dim", "n_heads", "n_kv_heads", "n_refiner_layers")


@cache
def transformers(dim: int, heads: int, refiners: int):
    """The reference transformer and ours, with the same random weights."""
    from reference import draw

    head = dim // heads
    model = transformer_reference(
        dim=dim, n_heads=heads, n_kv_heads=heads, n_refiner_layers=refiners, axes_dims=[head // 2, head // 4, head // 4]
    )
    draw(model, seed=5)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model, load_component(ZImageTransformer, folder)


def of_controlnet(model):
    config = model.config
    return transformers(config.dim, config.n_heads, config.n_refiner_layers)


def controlnet_reference(**settings):
    from diffusers import ZImageControlNetModel

    defaults = dict(
        dim=48,
        n_heads=3,
        n_kv_heads=3,
        control_layers_places=[0, 2],
        control_refiner_layers_places=[0, 1],
        control_in_dim=9,
        add_control_noise_refiner="control_noise_refiner",
    )
    return ZImageControlNetModel(**defaults | settings)


def controlnet_inputs(model, number: int) -> dict:
    base, _ = of_controlnet(model)
    inputs = transformer_inputs(base, number)
    return inputs | {
        "control": normal(3, *inputs["latents"].shape),
        "sizes": (model.config.dim, model.config.n_heads, model.config.n_refiner_layers),
    }


def run_controlnet(module, inputs):
    base = transformers(*inputs["sizes"])[1]
    arrays = {name: mx.array(value) for name, value in inputs.items() if name != "sizes"}
    control, latents = arrays.pop("control"), arrays.pop("latents")
    hints = module(base, latents, control=control, **arrays)
    yield from hints.values()
    yield base(latents, hints={place: 0.7 * hint for place, hint in hints.items()}, **arrays)


def run_controlnet_reference(model, inputs):
    import torch

    base = transformers(*inputs["sizes"])[0]
    own = vars(model)["_modules"].copy(), vars(model)["_parameters"].copy()
    control = torch.tensor(inputs["control"])
    rest = torch.zeros(len(control), model.config.control_in_dim - control.shape[1], *control.shape[2:])
    arguments = (
        [torch.tensor(latents)[:, None] for latents in inputs["latents"]],
        torch.tensor(inputs["timestep"]),
        [torch.tensor(embeds) for embeds in inputs["prompt_embeds"]],
    )
    hints = type(model).from_transformer(model, base)(*arguments, list(torch.cat([control, rest], dim=1)[:, :, None]))
    scaled = {place: 0.7 * hint for place, hint in hints.items()}
    prediction = base(*arguments, controlnet_block_samples=scaled).sample
    # What it borrowed is given back: the tests count and round its own parameters.
    vars(model)["_modules"], vars(model)["_parameters"] = own
    return [*hints.values(), torch.stack(prediction)[:, :, 0]]


def controlnet_full_size(config):
    from diffusers import ZImageControlNetModel

    return ZImageControlNetModel.from_config(config)


# What a layer of the text encoder holds.
_LAYER = (
    *(f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
_NARROW = dict(
    dim=16, n_heads=2, n_kv_heads=2, axes_dims=[4, 2, 2], in_channels=4, cap_feat_dim=16, n_layers=2,
    n_refiner_layers=1,
)  # fmt: skip
_CONTROLNET = dict(
    module=ZImageControlNet,
    reference=controlnet_reference,
    inputs=controlnet_inputs,
    ours=run_controlnet,
    theirs=run_controlnet_reference,
)

COMPONENTS = (
    Component(
        name="text_encoder",
        module=ZImageTextEncoder,
        reference=text_encoder_reference,
        settings={
            "as published": dict(),
            "own head": dict(tie_word_embeddings=False, num_hidden_layers=4, num_key_value_heads=4, head_dim=10),
            "other constants": dict(rms_norm_eps=1e-2, rope_parameters={"rope_type": "default", "rope_theta": 300.0}),
        },
        inputs=text_encoder_inputs,
        ours=run_text_encoder,
        theirs=run_text_encoder_reference,
        published={"Z-Image/text_encoder": 4_022_468_096},
        full_size=text_encoder_full_size,
        ignored=(*(f"layers.35.{part}" for part in _LAYER), "model.norm.weight", "lm_head.weight"),
        swap=dict(
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        ),
    ),
    Component(
        name="transformer",
        module=ZImageTransformer,
        reference=transformer_reference,
        settings={
            "as published": dict(),
            "other sizes": dict(
                dim=40, n_heads=2, n_kv_heads=2, axes_dims=[8, 4, 8], in_channels=16, n_layers=1, n_refiner_layers=1
            ),
            "one refiner, other constants": dict(
                n_refiner_layers=1, norm_eps=1e-2, t_scale=300.0, rope_theta=20.0, cap_feat_dim=48
            ),
            "no norm of heads": dict(qk_norm=False, n_layers=2),
            "patches of one": dict(all_patch_size=[1], in_channels=12),
        },
        inputs=transformer_inputs,
        ours=run_transformer,
        theirs=run_transformer_reference,
        published={"Z-Image/transformer": 6_154_908_736},
        full_size=transformer_full_size,
        swap=_NARROW,
    ),
    Component(
        name="controlnet",
        settings={
            "Union 2.1": dict(),
            "lite": dict(control_layers_places=[0, 1, 2], n_heads=2, n_kv_heads=2, dim=32, control_in_dim=11),
            "hints after the second refiner only": dict(control_refiner_layers_places=[1], norm_eps=1e-2),
        },
        published={"Z-Image-Turbo-Fun-Controlnet-Union-2.1": 3_356_225_792},
        full_size=controlnet_full_size,
        swap=dict(dim=16, n_heads=2, n_kv_heads=2, control_in_dim=4),
        **_CONTROLNET,
    ),
    Component(
        name="controlnet 1.0 and 2.0",
        settings={
            "Union 1.0": dict(add_control_noise_refiner=None, control_refiner_layers_places=None, control_in_dim=4),
            "Union 2.0": dict(add_control_noise_refiner="control_layers"),
            "Union 2.0, wider": dict(
                add_control_noise_refiner="control_layers",
                dim=40,
                n_heads=5,
                n_kv_heads=5,
                control_layers_places=[0, 1],
            ),
        },
        swap=dict(add_control_noise_refiner="control_layers", dim=16, n_heads=2, n_kv_heads=2, control_in_dim=4),
        **_CONTROLNET,
    ),
)

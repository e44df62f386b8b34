"""Ideogram 4: what the tests of all families need to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from support.cases import Component, Pipeline, Settings, Tiny
from support.images import generated, noise, pipeline_reference
from support.tokenizers import write_json, write_qwen_tokenizer

from families.flux.cases import key_biases, normal, same_sum_in_a_resnet, token_ids
from families.flux2.cases import vae_full_size, vae_inputs, vae_reference
from mflux.backend import mx
from mflux.models.ideogram4.latent_creator import Ideogram4LatentCreator
from mflux.models.ideogram4.model.autoencoder import Ideogram4Autoencoder
from mflux.models.ideogram4.model.text_encoder import Ideogram4TextEncoder, WholeTextEncoder
from mflux.models.ideogram4.model.transformer import Ideogram4Transformer

# ---- text encoder

# All 36 layers are asked for.
QWEN3 = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=36, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-6,
    rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[2, 1, 1], mrope_interleaved=True),
)  # fmt: skip
VISION = dict(
    depth=1, hidden_size=8, intermediate_size=8, num_heads=1, out_hidden_size=16, num_position_embeddings=4,
    patch_size=4, deepstack_visual_indexes=[0],
)  # fmt: skip
_TAPS = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 35)


def qwen3_reference(**settings):
    from transformers import Qwen3VLConfig, Qwen3VLModel

    return Qwen3VLModel(Qwen3VLConfig(text_config=QWEN3 | settings, vision_config=VISION))


def qwen3_inputs(model, number: int) -> dict:
    return {"ids": token_ids(*((1, 9), (3, 14))[number], model.config.text_config.vocab_size)}


def run_qwen3(module, inputs):
    return [module(mx.array(inputs["ids"]))]


def run_qwen3_reference(model, inputs):
    import torch
    from diffusers import Ideogram4Pipeline

    ids = torch.tensor(inputs["ids"])
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    states = Ideogram4Pipeline._get_text_encoder_hidden_states(model, ids, torch.ones_like(ids), positions)
    return [torch.stack(states, dim=-1).flatten(-2)]


def qwen3_full_size(config):
    from transformers import Qwen3VLConfig, Qwen3VLModel

    return Qwen3VLModel(Qwen3VLConfig(**config))


def vision_parts() -> tuple[str, ...]:
    """Ends of the names of what no prompt goes through."""
    return (
        "language_model.norm.weight", "patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed.weight",
        *(f"{layer}.{leaf}" for leaf in ("weight", "bias") for layer in (
            "attn.proj", "attn.qkv", "mlp.linear_fc1", "mlp.linear_fc2", "norm1", "norm2", "merger.norm",
            "merger.linear_fc1", "merger.linear_fc2",
            *(f"deepstack_merger_list.{number}.{part}" for number in range(3)
              for part in ("norm", "linear_fc1", "linear_fc2")),
        )),
    )  # fmt: skip


# ---- transformer

TRANSFORMER = dict(
    in_channels=12, num_layers=2, attention_head_dim=24, num_attention_heads=2, intermediate_size=40, adaln_dim=10,
    llm_features_dim=26, mrope_section=(6, 3, 3),
)  # fmt: skip


def transformer_reference(**settings):
    from diffusers import Ideogram4Transformer2DModel

    return Ideogram4Transformer2DModel(**TRANSFORMER | settings)


def transformer_inputs(model, number: int) -> dict:
    batch, rows, columns, length = ((1, 3, 5, 7), (3, 6, 2, 11))[number]
    return {
        "latents": normal(1, batch, rows * columns, model.config.in_channels),
        "text": normal(2, batch, length, model.config.llm_features_dim),
        # One time for each sample, so that none can stand for all.
        "timestep": np.linspace(0.15, 0.7, batch, dtype=np.float32),
        "size": np.array([rows, columns]),
    }


def run_transformer(module, inputs):
    """With a prompt, and without."""
    latents, text, time = (mx.array(inputs[name]) for name in ("latents", "text", "timestep"))
    rows, columns = inputs["size"].tolist()
    yield module(latents, time=time, rows=rows, columns=columns, prompt_embeds=text)
    yield module(latents, time=time, rows=rows, columns=columns)


def run_transformer_reference(model, inputs):
    import torch
    from diffusers import Ideogram4Pipeline

    latents, text, time = (torch.tensor(inputs[name]) for name in ("latents", "text", "timestep"))
    latents, text = latents.to(model.dtype), text.to(model.dtype)
    batch, length = text.shape[:2]
    rows, columns = inputs["size"].tolist()
    for length in (length, 0):  # noqa: B020
        ids = Ideogram4Pipeline._prepare_ids([length] * batch, rows, columns, length, torch.device("cpu"))
        features = torch.zeros(batch, length + rows * columns, text.shape[-1], dtype=text.dtype)
        features[:, :length] = text[:, :length]
        tokens = torch.cat([torch.zeros(batch, length, latents.shape[-1], dtype=latents.dtype), latents], dim=1)
        found = model(tokens, time, features, *ids, return_dict=False)[0]
        yield found[:, length:]


def transformer_full_size(config):
    from diffusers import Ideogram4Transformer2DModel

    return Ideogram4Transformer2DModel.from_config(config)


# ---- autoencoder


def run_vae(module, inputs):
    yield module.encode(mx.array(inputs["image"]))
    yield module.decode(mx.array(inputs["latents"]))


def run_vae_reference(model, inputs):
    """The lines of diffusers' pipeline that decode, and their opposite."""
    import torch

    mean, variance = model.bn.running_mean, model.bn.running_var
    deviation = torch.sqrt(variance + model.config.batch_norm_eps)
    side, channels = model.config.patch_size[0], model.config.latent_channels
    clean = model.encode(torch.tensor(inputs["image"])).latent_dist.mode()
    batch, _, height, width = clean.shape
    squares = clean.reshape(batch, channels, height // side, side, width // side, side).permute(0, 2, 4, 3, 5, 1)
    encoded = (squares.flatten(3) - mean) / deviation

    tokens = torch.tensor(inputs["latents"]).permute(0, 2, 3, 1) * deviation + mean
    batch, rows, columns, _ = tokens.shape
    latents = tokens.view(batch, rows, columns, side, side, channels).permute(0, 5, 1, 3, 2, 4)
    latents = latents.reshape(batch, channels, rows * side, columns * side)
    return [encoded.permute(0, 3, 1, 2), model.decode(latents).sample]


COMPONENTS = (
    Component(
        name="text_encoder",
        module=Ideogram4TextEncoder,
        reference=qwen3_reference,
        settings={
            "as published": {},
            "three heads of their own": dict(num_attention_heads=3, num_key_value_heads=3, hidden_size=24),
        },
        inputs=qwen3_inputs,
        ours=run_qwen3,
        theirs=run_qwen3_reference,
        published={"ideogram-4/text_encoder (Qwen3-VL-8B)": 8_144_793_840},
        full_size=qwen3_full_size,
        ignored=vision_parts(),
    ),
    Component(
        name="transformer",
        module=Ideogram4Transformer,
        reference=transformer_reference,
        settings={
            "as published": {},
            "one head, other axes": dict(
                num_attention_heads=1, attention_head_dim=32, mrope_section=(6, 5, 5), norm_eps=1e-3
            ),
            "three layers, short periods": dict(num_layers=3, rope_theta=60, in_channels=5, adaln_dim=16),
        },
        inputs=transformer_inputs,
        ours=run_transformer,
        theirs=run_transformer_reference,
        # An attention as sharp as a trained one's, where positions show.
        gains={"norm_q.weight": 2.0, "norm_k.weight": 2.0},
        published={"ideogram-4/transformer": 9_279_288_448},
        full_size=transformer_full_size,
        swap=dict(
            in_channels=16, attention_head_dim=16, num_attention_heads=1, intermediate_size=16, adaln_dim=16,
            llm_features_dim=16, mrope_section=(4, 2, 2),
        ),
    ),
    Component(
        name="vae",
        module=Ideogram4Autoencoder,
        reference=vae_reference,
        settings={
            "as published": {},
            "another epsilon": dict(batch_norm_eps=0.3, latent_channels=3),
        },
        inputs=vae_inputs,
        ours=run_vae,
        theirs=run_vae_reference,
        gains={"decoder.conv_out.weight": 0.3},
        published={"ideogram-4/vae": 84_046_115},
        full_size=vae_full_size,
        buffers=("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"),
        ignored=("bn.num_batches_tracked",),
        neutral=(key_biases, same_sum_in_a_resnet),
    ),
)  # fmt: skip


# ---- whole images

PROMPT = '{"compositional_deconstruction":{"background":"a Café\'s wall 猫","elements":[]}}'
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{{ c.text }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path) -> int:
    """Returns how many tokens there are."""
    return len(write_qwen_tokenizer(folder, chat_template=_TEMPLATE))


def write_ideogram(folder: Path, *, layers: int = 2, heads: int = 2) -> Path:
    """A tiny model as it is published, by the reference classes."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from support.reference import draw

    vocabulary = write_tokenizer(folder / "tokenizer")
    draw(qwen3_reference(vocab_size=vocabulary), 1).save_pretrained(folder / "text_encoder")
    settings = dict(in_channels=128, num_layers=layers, num_attention_heads=heads, llm_features_dim=13 * 16)
    for seed, part in ((2, "transformer"), (3, "unconditional_transformer")):
        draw(transformer_reference(**settings), seed).save_pretrained(folder / part)
    vae = vae_reference(block_out_channels=[8, 8, 16, 16], latent_channels=32)
    draw(vae, 4, {"decoder.conv_out.weight": 0.3}).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    content = {
        "_class_name": "Ideogram4Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3VLModel"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "Ideogram4Transformer2DModel"],
        "unconditional_transformer": ["diffusers", "Ideogram4Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    write_json(folder / "model_index.json", content)
    return folder


def draw_ours(folder: Path, settings):
    from mflux.models.ideogram4 import Ideogram4

    settings = {name: value for name, value in settings.items() if name != "theirs"}
    return generated(Ideogram4(model_path=str(folder)), **settings)


def draw_theirs(folder: Path, settings):
    pipeline = pipeline_reference(folder, "Ideogram4Pipeline")
    seen = {}

    def after_step(_pipeline, step, timestep, values):
        seen.update(values)
        return values

    image = pipeline(
        prompt=settings["prompt"],
        height=settings["height"],
        width=settings["width"],
        latents=noise(Ideogram4LatentCreator, settings),
        max_sequence_length=600,
        callback_on_step_end=after_step,
        **settings["theirs"],
    ).images[0]
    return seen["latents"].numpy(), np.asarray(image)


def _picture(theirs: Settings, **settings):
    return dict(seed=3, prompt=PROMPT, height=48, width=80, theirs=theirs) | settings


def _constant(steps: int, guidance: float, mu: float = 0.0, std: float = 1.75) -> dict:
    return dict(num_inference_steps=steps, guidance_scale=guidance, guidance_schedule=None, mu=mu, std=std)


PIPELINES = (
    Pipeline(
        name="images",
        folders={
            "two heads": write_ideogram,
            "one head": lambda folder: write_ideogram(folder, heads=1, layers=1),
        },
        pictures={
            "the usual preset": (
                "two heads",
                _picture(dict(num_inference_steps=20, guidance_schedule=[7.0] * 18 + [3.0] * 2, mu=0.0, std=1.75)),
            ),
            "another preset": (
                "one head",
                _picture(
                    dict(num_inference_steps=12, guidance_schedule=[7.0] * 11 + [3.0], mu=0.5, std=1.75),
                    preset="V4_TURBO_12", height=96, width=32, seed=2**63,
                ),
            ),
            "the long preset": (
                "one head",
                _picture(
                    dict(num_inference_steps=48, guidance_schedule=[7.0] * 45 + [3.0] * 3, mu=0.0, std=1.5),
                    preset="V4_QUALITY_48", height=32, width=48,
                ),
            ),
            "another number of steps": ("two heads", _picture(_constant(5, 7.0), num_inference_steps=5)),
            "not guided": ("two heads", _picture(_constant(3, 1.0), num_inference_steps=3, guidance=1.0)),
            "guided a little": (
                "two heads",
                _picture(_constant(1, 2.5), num_inference_steps=1, guidance=2.5, prompt="a red circle, en été 広場"),
            ),
            "guided as long as it is said": (
                "one head",
                _picture(
                    dict(num_inference_steps=4, guidance_schedule=[7.0, 7.0, 1.0, 1.0], mu=0.0, std=1.75),
                    num_inference_steps=4, cfg_end=0.5,
                ),
            ),
            "an empty prompt": ("two heads", _picture(_constant(2, 7.0), prompt="", num_inference_steps=2)),
            "a long prompt": (
                "two heads", _picture(_constant(2, 7.0), prompt="the red circle " * 40, num_inference_steps=2)
            ),
        },
        ours=draw_ours,
        theirs=draw_theirs,
    ),
)  # fmt: skip


# ---- a model that needs no reference


def write_tiny(folder: Path, *, wide: bool = False, changes: Mapping[str, Settings] | None = None) -> Path:
    """A whole model of random weights, in the published layout; `changes` are to configurations, by folder."""
    from support.tiny import published, write_components

    width = 64 if wide else 32
    vocabulary = write_tokenizer(folder / "tokenizer")
    write_json(folder / "model_index.json", {"_class_name": "Ideogram4Pipeline"})
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    transformer = {
        "_class_name": "Ideogram4Transformer2DModel", "num_layers": 2, "attention_head_dim": width,
        "num_attention_heads": 1, "intermediate_size": 2 * width, "adaln_dim": width // 2,
        "llm_features_dim": 13 * width, "mrope_section": [width * 3 // 32, width * 5 // 64, width * 5 // 64],
    }  # fmt: skip
    parts = {
        "text_encoder": (WholeTextEncoder, {
            "architectures": ["Qwen3VLModel"], "model_type": "qwen3_vl",
            "text_config": {
                "model_type": "qwen3_vl_text", "vocab_size": vocabulary, "hidden_size": width,
                "intermediate_size": 2 * width, "num_hidden_layers": 36, "num_attention_heads": 2,
                # As published: no shape of a folder that mflux 0.24 saved tells it.
                "num_key_value_heads": 1, "head_dim": 128, "rope_theta": 5e6,
            },
        }),
        "transformer": (Ideogram4Transformer, transformer),
        "unconditional_transformer": (Ideogram4Transformer, transformer),
        "vae": (Ideogram4Autoencoder, {
            "_class_name": "AutoencoderKLFlux2", "block_out_channels": [8, 8, 16, width], "norm_num_groups": 4,
            "layers_per_block": 1, "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        }),
    }  # fmt: skip

    def weights(module, *, seed: int) -> dict[str, mx.array]:
        tensors = published(module, seed=seed)
        if isinstance(module, Ideogram4Autoencoder):
            tensors["bn.running_var"] = mx.abs(tensors["bn.running_var"]) + 0.5
            tensors["bn.num_batches_tracked"] = mx.array(7)
        return tensors

    return write_components(folder, parts, changes=changes, draw=weights)


TINY = (
    Tiny(
        write=write_tiny,
        command="generate-ideogram4",
        base_model="ideogram-4-fp8",
        pipeline="mflux.models.ideogram4.variants.txt2img.ideogram4:Ideogram4",
        prompt=PROMPT,
        refused=(
            ("transformer", {"_class_name": "FluxTransformer2DModel"}, "not Ideogram 4's transformer"),
            ("transformer", {"in_channels": 64}, "a transformer that takes 64;"),
            ("transformer", {"mrope_section": [8, 8]}, "mrope_section"),
            ("transformer", {"mrope_section": [8, 80, 8]}, "mrope_section"),
            ("transformer", {"rope_theta": -5}, "rope_theta"),
            ("transformer", {"attention_head_dim": 33}, "33"),
            ("vae", {"latent_channels": 16}, "64 latent channels for every 16 pixels"),
            ("text_encoder", {"text_config": {"model_type": "llama"}}, "'qwen3_vl_text' belongs here"),
        ),
    ),
)

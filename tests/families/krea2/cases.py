"""Krea 2: what the tests of all families need to know of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from support.cases import Component, Pipeline, Settings, Tiny, Training
from support.images import generated, noise, photo, pipeline_reference
from support.tokenizers import write_json, write_qwen_tokenizer

from families.flux.cases import normal, token_ids
from families.qwen.cases import run_vae_reference, vae_reference
from mflux.backend import mx
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.autoencoders.wan import AutoencoderWan
from mflux.models.krea2.latent_creator import Krea2LatentCreator
from mflux.models.krea2.model.text_encoder import Krea2TextEncoder, WholeTextEncoder
from mflux.models.krea2.model.transformer import Krea2Transformer

# ---- text encoder

ROPE = {"mrope_interleaved": True, "mrope_section": [3, 3, 2], "rope_type": "default", "rope_theta": 5000.0}
QWEN3_VL = dict(
    vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rope_scaling=ROPE, rope_parameters=ROPE,
)  # fmt: skip
VISION = dict(
    depth=2, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=4, out_hidden_size=24,
    num_position_embeddings=16, deepstack_visual_indexes=[0, 1],
)  # fmt: skip
LAYERS = [1, 2, 4]
# What the published file holds that no prompt goes through.
_UNUSED = (
    ".norm.weight", ".norm.bias", "pos_embed.weight", ".proj.weight", ".proj.bias", "norm1.weight", "norm1.bias",
    "norm2.weight", "norm2.bias", "qkv.weight", "qkv.bias", "linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight",
    "linear_fc2.bias",
    *(
        f".layers.35.{leaf}.weight"
        for leaf in (
            "input_layernorm", "post_attention_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm",
            "self_attn.k_norm",
        )
    ),
)  # fmt: skip


def encoder_reference(layers=LAYERS, **settings):
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = QWEN3_VL | settings
    vision = VISION | dict(out_hidden_size=text["hidden_size"])
    model = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))
    model.layers = list(layers)
    return model


def save_encoder(model, folder: Path) -> Path:
    """With what `model_index.json` says of it."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"text_encoder_select_layers": model.layers})
    return folder


def encoder_inputs(model, number: int) -> dict:
    return {"ids": token_ids(*((1, 9), (3, 40))[number], model.config.text_config.vocab_size)}


def run_encoder(module, inputs):
    return [module(mx.array(inputs["ids"]))]


def run_encoder_reference(model, inputs):
    import torch

    states = model(input_ids=torch.tensor(inputs["ids"]), output_hidden_states=True).hidden_states
    return [torch.stack([states[layer] for layer in model.layers], dim=2)]


def encoder_full_size(config):
    from transformers import Qwen3VLConfig, Qwen3VLModel

    return Qwen3VLModel(Qwen3VLConfig(**config))


# ---- transformer

TRANSFORMER = dict(
    in_channels=12, num_layers=2, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, timestep_embed_dim=32, text_hidden_dim=24, num_text_layers=3, text_num_attention_heads=2,
    text_num_key_value_heads=2, text_intermediate_size=40, axes_dims_rope=[4, 6, 6],
)  # fmt: skip


def transformer_reference(**settings):
    from diffusers import Krea2Transformer2DModel

    return Krea2Transformer2DModel(**TRANSFORMER | settings)


def transformer_inputs(model, number: int) -> dict:
    batch, rows, columns, length = ((1, 3, 5, 7), (3, 6, 2, 11))[number]
    config = model.config
    return {
        "latents": normal(1, batch, rows * columns, config.in_channels),
        "text": normal(2, batch, length, config.num_text_layers, config.text_hidden_dim),
        # One noise level for each sample, so that none can stand for all.
        "sigma": np.linspace(0.9, 0.3, batch, dtype=np.float32),
        "grid": (rows, columns),
    }


def run_transformer(module, inputs):
    latents, text, sigma = (mx.array(inputs[name]) for name in ("latents", "text", "sigma"))
    yield module(latents, sigma=sigma, prompt_embeds=text, grid=tuple(inputs["grid"]))


def run_transformer_reference(model, inputs):
    import torch
    from diffusers import Krea2Pipeline

    latents, text, sigma = (torch.tensor(inputs[name]) for name in ("latents", "text", "sigma"))
    # As the pipeline hands them over.
    latents, text = latents.to(model.dtype), text.to(model.dtype)
    ids = Krea2Pipeline.prepare_position_ids(text.shape[1], *inputs["grid"], device=None)
    return [model(latents, text, sigma, ids, return_dict=False)[0]]


def transformer_full_size(config):
    from diffusers import Krea2Transformer2DModel

    return Krea2Transformer2DModel.from_config(config)


def norms_without_positions(first: str, second: str) -> bool:
    """Of queries and keys that are not turned only the product of their norms' weights counts, channel by channel."""
    block = first.rpartition(".norm_")[0]
    return "text_fusion." in block and {first, second} == {f"{block}.norm_{one}.weight" for one in "qk"}


COMPONENTS = (
    Component(
        name="text_encoder",
        module=Krea2TextEncoder,
        reference=encoder_reference,
        settings={
            "as published": {},
            "the embedding and the last one among them": dict(
                layers=[0, 3, 6], num_hidden_layers=6, hidden_size=40, num_attention_heads=6, head_dim=8,
                rope_scaling=ROPE | {"mrope_section": [2, 1, 1], "rope_theta": 100.0},
                rope_parameters=ROPE | {"mrope_section": [2, 1, 1], "rope_theta": 100.0},
            ),
        },
        inputs=encoder_inputs,
        ours=run_encoder,
        theirs=run_encoder_reference,
        save=save_encoder,
        published={"Krea-2/text_encoder (Qwen3-VL-4B)": 4_437_815_808},
        full_size=encoder_full_size,
        ignored=_UNUSED,
    ),
    Component(
        name="transformer",
        module=Krea2Transformer,
        reference=transformer_reference,
        settings={
            "as published": {},
            "one head of keys, shared text heads": dict(
                num_attention_heads=3, num_key_value_heads=1, num_layers=1, text_num_attention_heads=6,
                text_num_key_value_heads=3, text_hidden_dim=48, num_text_layers=5, norm_eps=1e-3, rope_theta=20.0,
            ),
            "other depths and axes": dict(
                num_layerwise_text_blocks=1, num_refiner_text_blocks=3, num_layers=3, axes_dims_rope=[8, 2, 6],
                num_key_value_heads=4, in_channels=8, timestep_embed_dim=20,
            ),
        },
        inputs=transformer_inputs,
        ours=run_transformer,
        theirs=run_transformer_reference,
        published={"Krea-2/transformer": 12_820_073_036},
        full_size=transformer_full_size,
        # An attention as sharp as a trained one's, where positions show; and tables that count beside the noise level.
        gains={"norm_q.weight": 1.5, "norm_k.weight": 1.5, "scale_shift_table": 3.0},
        swap=dict(
            in_channels=16, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16,
            timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=3, text_intermediate_size=16,
            axes_dims_rope=[4, 2, 2],
        ),
        neutral=(norms_without_positions,),
        neutral_pairs=4,
    ),
)  # fmt: skip


# ---- whole images

SCHEDULER = dict(
    base_image_seq_len=256, base_shift=0.5, max_image_seq_len=6400, max_shift=1.15, num_train_timesteps=1000, shift=1.0,
    time_shift_type="exponential", use_dynamic_shifting=True,
)  # fmt: skip
PROMPT = "a large red circle on a Café's wall 猫 🐱"


def write_krea2(folder: Path, *, turbo: bool = True, heads: int = 2, layers: int = 2, taken=LAYERS) -> Path:
    """A tiny model as it is published, by the reference classes."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from support.reference import draw

    vocabulary = len(write_qwen_tokenizer(folder / "tokenizer"))
    draw(encoder_reference(vocab_size=vocabulary), 1).save_pretrained(folder / "text_encoder")
    transformer = transformer_reference(
        in_channels=64, num_attention_heads=heads, num_layers=layers, num_key_value_heads=1, num_text_layers=len(taken)
    )
    draw(transformer, 2).save_pretrained(folder / "transformer")
    vae = vae_reference(base_dim=4, dim_mult=[1, 2, 2, 2], temperal_downsample=[False, True, True], z_dim=16)
    draw(vae, 3, {"decoder.conv_out.weight": 0.2}).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    content = {
        "_class_name": "Krea2Pipeline",
        "is_distilled": turbo,
        "patch_size": 2,
        "text_encoder_select_layers": list(taken),
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3VLModel"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "Krea2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    write_json(folder / "model_index.json", content)
    return folder


def draw_ours(folder: Path, settings):
    from mflux.models.krea2 import Krea2

    return generated(Krea2(model_path=str(folder), model_config=ModelConfig.krea2_raw()), **settings)


def packed(pipeline, latents):
    return pipeline._pack_latents(latents, *latents.shape)


def draw_theirs(folder: Path, settings, pipeline=None):
    import PIL.Image
    import torch
    from diffusers.pipelines.krea2.pipeline_krea2 import calculate_shift

    pipeline = pipeline or pipeline_reference(folder, "Krea2Pipeline")
    height, width, steps = settings["height"], settings["width"], settings["num_inference_steps"]
    latents, sigmas = noise(Krea2LatentCreator, settings), np.linspace(1.0, 1 / steps, steps)
    if source := settings.get("image_path"):
        # The reference has no image to image: the same loop, begun later.
        first = max(1, int(steps * settings["image_strength"]))
        picture = source.resize((width, height), PIL.Image.Resampling.LANCZOS)
        pixels = pipeline.image_processor.preprocess(picture).numpy()
        with torch.no_grad():
            clean = run_vae_reference(pipeline.vae, {"image": pixels, "latents": latents.numpy()})[0]
        mu = 1.15 if pipeline.config.is_distilled else calculate_shift(height * width // 256, 256, 6400, 0.5, 1.15)
        sigma = 1 / (1 + np.exp(-mu) * (1 / sigmas[first] - 1))
        latents, sigmas = ((1 - sigma) * clean + sigma * latents).float(), sigmas[first:]
    seen = {}

    def after_step(_pipeline, step, timestep, values):
        seen.update(values)
        return values

    image = pipeline(
        prompt=settings["prompt"],
        negative_prompt=settings.get("negative_prompt"),
        height=height,
        width=width,
        num_inference_steps=steps,
        sigmas=sigmas,
        # As the reference counts it.
        guidance_scale=settings.get("guidance", 1.0) - 1,
        latents=packed(pipeline, latents),
        callback_on_step_end=after_step,
    ).images[0]
    return pipeline._unpack_latents(seen["latents"], height, width)[:, :, 0].numpy(), np.asarray(image)


# ---- with the depth ControlNet

TARGETS = {
    **{f"attn.{name}": f"attn.{own}" for name, own in (
        ("wq", "to_q"), ("wk", "to_k"), ("wv", "to_v"), ("wo", "to_out.0"), ("gate", "to_gate"),
    )},
    **{f"mlp.{name}": f"ff.{name}" for name in ("gate", "up", "down")},
}  # fmt: skip


def write_control(folder: Path, file: Path, *, rank: int = 3) -> Path:
    """A ControlNet for a model, under the names of the published one."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(next((folder / "transformer").glob("*.safetensors")))
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    width, channels = weights["img_in.weight"].shape
    tensors = {"first.weight": draw(width, 2 * channels), "first.bias": draw(width)}
    blocks = len({name.split(".")[1] for name in weights if name.startswith("transformer_blocks.")})
    for block in range(blocks):
        for theirs, ours in TARGETS.items():
            out, size = weights[f"transformer_blocks.{block}.{ours}.weight"].shape
            tensors[f"blocks.{block}.{theirs}.A"] = draw(rank, size)
            tensors[f"blocks.{block}.{theirs}.B"] = draw(out, rank)
    save_file(tensors, file)
    return file


def write_controlled(folder: Path, **options) -> Path:
    write_control(write_krea2(folder, **options), folder / "depth-control-lora.safetensors")
    return folder


def draw_controlled(folder: Path, settings):
    from mflux.models.krea2.variants.controlnet.krea2_controlnet import Krea2Controlnet

    settings = dict(settings)
    model = Krea2Controlnet(
        model_path=str(folder), controlnet_path=str(folder / "depth-control-lora.safetensors"),
        controlnet_strength=settings.pop("strength", 1.0),
    )  # fmt: skip
    return generated(model, **settings)


def draw_controlled_theirs(folder: Path, settings):
    """The reference knows no ControlNet of Krea 2: its own pipeline, with the transformer's weights changed."""
    import PIL.Image
    import torch
    from diffusers import Krea2Pipeline
    from safetensors.torch import load_file

    pipeline = Krea2Pipeline.from_pretrained(folder)
    control = load_file(folder / "depth-control-lora.safetensors")
    transformer, strength = pipeline.transformer, settings.get("strength", 1.0)
    size = settings["width"], settings["height"]
    picture = settings["depth_image_path"].resize(size, PIL.Image.Resampling.LANCZOS)
    pixels = pipeline.image_processor.preprocess(picture).numpy()
    inputs = {"image": pixels, "latents": noise(Krea2LatentCreator, settings).numpy()}
    with torch.no_grad():
        tokens = packed(pipeline, run_vae_reference(pipeline.vae, inputs)[0].float())
        for number, block in enumerate(transformer.transformer_blocks):
            for theirs, ours in TARGETS.items():
                a, b = (control[f"blocks.{number}.{theirs}.{half}"] for half in "AB")
                block.get_submodule(ours).weight += strength * b @ a

    class Entrance(torch.nn.Module):
        def forward(self, x):
            both = torch.cat([x, tokens.expand(x.shape[0], -1, -1)], dim=-1)
            return torch.nn.functional.linear(both, control["first.weight"], control["first.bias"])

    transformer.img_in = Entrance()
    plain = {name: value for name, value in settings.items() if name not in ("strength", "depth_image_path")}
    return draw_theirs(folder, plain, pipeline)


def _picture(**settings):
    return dict(seed=3, prompt=PROMPT, num_inference_steps=3, height=48, width=80) | settings


PIPELINES = (
    Pipeline(
        name="images",
        folders={
            "turbo": write_krea2,
            "raw": lambda folder: write_krea2(folder, turbo=False, heads=3, layers=1, taken=[0, 5]),
        },
        pictures={
            "turbo": ("turbo", _picture()),
            "turbo, guided": ("turbo", _picture(guidance=2.0, num_inference_steps=4)),
            "raw": ("raw", _picture(height=96, width=32, seed=2**63)),
            "raw, guided": (
                "raw", _picture(guidance=4.5, negative_prompt="a blue square, en été 広場", num_inference_steps=5)
            ),
            "guided away from blanks": ("raw", _picture(guidance=3.0, negative_prompt="  ", num_inference_steps=2)),
            "an empty prompt": ("turbo", _picture(prompt="", num_inference_steps=1)),
            "a long prompt, cut": ("turbo", _picture(prompt="a blue square " * 200, num_inference_steps=2)),
            "from an image": (
                "turbo", _picture(image_path=photo(100, 70), image_strength=0.4, num_inference_steps=5)
            ),
            "from an image, guided": (
                "raw",
                _picture(image_path=photo(64, 64), image_strength=0.75, num_inference_steps=6, guidance=2.0, height=64),
            ),
        },
        ours=draw_ours,
        theirs=draw_theirs,
    ),
    Pipeline(
        name="images after a depth map",
        folders={
            "turbo": write_controlled,
            "three heads": lambda folder: write_controlled(folder, turbo=False, heads=3, layers=1, taken=[0, 5]),
        },
        pictures={
            "the map's size is another": ("turbo", _picture(depth_image_path=photo(50, 90))),
            "guided, and stronger": (
                "three heads", _picture(depth_image_path=photo(48, 96), strength=1.7, guidance=3.0, height=96, width=48)
            ),
            "without its changes to the blocks": ("turbo", _picture(depth_image_path=photo(80, 48), strength=0.0)),
        },
        ours=draw_controlled,
        theirs=draw_controlled_theirs,
    ),
)  # fmt: skip


# ---- a model that needs no reference


def write_tiny(folder: Path, *, wide: bool = False, changes: Mapping[str, Settings] | None = None) -> Path:
    """A whole model of random weights, in the published layout; `changes` are to configurations, by folder."""
    from support.tiny import write_components

    width = 64 if wide else 32
    vocabulary = len(write_qwen_tokenizer(folder / "tokenizer"))
    index = {"_class_name": "Krea2Pipeline", "is_distilled": True, "text_encoder_select_layers": LAYERS}
    write_json(folder / "model_index.json", index)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler"} | SCHEDULER
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    parts = {
        "text_encoder": (WholeTextEncoder, {
            "architectures": ["Qwen3VLModel"], "model_type": "qwen3_vl", "text_encoder_select_layers": LAYERS,
            "text_config": {
                "model_type": "qwen3_vl_text", "vocab_size": vocabulary, "hidden_size": width,
                "intermediate_size": 2 * width, "num_hidden_layers": 5, "num_attention_heads": 2,
                "num_key_value_heads": 1, "head_dim": width, "rope_theta": 5e6,
                "rope_scaling": {"mrope_section": [width // 2, 0, 0], "rope_type": "default"},
            },
        }),
        "transformer": (Krea2Transformer, {
            "_class_name": "Krea2Transformer2DModel", "num_layers": 2, "attention_head_dim": width // 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 2 * width,
            "timestep_embed_dim": 64, "text_hidden_dim": width, "num_text_layers": len(LAYERS),
            "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 2 * width,
            "axes_dims_rope": [width // 8, width * 3 // 16, width * 3 // 16],
        }),
        "vae": (AutoencoderWan, {
            "_class_name": "AutoencoderKLQwenImage", "base_dim": 4, "dim_mult": [1, 2, 2, 2],
        }),
    }  # fmt: skip
    return write_components(folder, parts, changes=changes)


def write_tiny_controlled(folder: Path, *, wide: bool = False) -> Path:
    """The same, with a ControlNet in a folder of its own."""
    from support.tiny import write_components

    from mflux.models.krea2.model.depth_control import DepthControl

    width = 64 if wide else 32
    sizes = {"width": width, "in_channels": 64, "key_width": width // 2, "hidden": 2 * width, "num_layers": 2}
    write_tiny(folder, wide=wide)
    return write_components(folder, {"controlnet": (DepthControl, sizes | {"rank": 4})}, seed=9)


_SOURCE = Path(__file__).parents[3] / "docs" / "demo.png"
_KREA2 = "mflux.models.krea2.variants.txt2img.krea2:Krea2"

TINY = (
    Tiny(
        write=write_tiny,
        command="generate-krea2",
        base_model="krea-2",
        pipeline=_KREA2,
        # What the command takes where nothing is said.
        generate={"guidance": 1.0},
        refused=(
            ("transformer", {"_class_name": "FluxTransformer2DModel"}, "not Krea 2's transformer"),
            ("transformer", {"in_channels": 16}, "a transformer that takes 16;"),
            ("transformer", {"num_text_layers": 4}, "different models"),
            ("transformer", {"text_hidden_dim": 16}, "different models"),
            ("transformer", {"axes_dims_rope": [8, 8]}, "axes_dims_rope"),
            ("transformer", {"num_key_value_heads": 3}, "cannot share 3"),
            ("vae", {"z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "with 4 latent channels"),
            ("text_encoder", {"text_config": {"model_type": "llama"}}, "'qwen3_vl_text' belongs here"),
            ("text_encoder", {"text_config": {"model_type": "qwen3_vl_text", "num_hidden_layers": 3}}, "do not have"),
        ),
    ),
    Tiny(
        write=write_tiny_controlled,
        command="generate-krea2-controlnet",
        base_model="krea-2-controlnet-depth",
        words=("--depth-image-path", _SOURCE),
        pipeline="mflux.models.krea2.variants.controlnet.krea2_controlnet:Krea2Controlnet",
        generate={"guidance": 1.0, "depth_image_path": _SOURCE},
        changes_weights=True,
    ),
)


# ---- training


def _encoded(folder: Path, image, prompt: str, width: int, height: int, source):
    import torch

    pipeline = pipeline_reference(folder, "Krea2Pipeline")
    if prompt.startswith("{"):
        prompt = json.loads(prompt)["high_level_description"]
    with torch.no_grad():
        embeds, mask = pipeline.encode_prompt(prompt)
        pixels = pipeline.image_processor.preprocess(image, height=height, width=width).numpy()
        inputs = {"image": pixels, "latents": np.zeros((1, 16, 2, 2), np.float32)}
        latents = run_vae_reference(pipeline.vae, inputs)[0]
    return latents, {"prompt_embeds": embeds[:, mask[0].bool()]}


def _velocity(transformer, latents, sigma, cond, width: int, height: int, guidance: float):
    import torch
    from diffusers import Krea2Pipeline

    embeds, (rows, columns, side) = cond["prompt_embeds"], (height // 16, width // 16, 2)
    tokens = latents.reshape(1, -1, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5).reshape(1, rows * columns, -1)
    ids = Krea2Pipeline.prepare_position_ids(embeds.shape[1], rows, columns, device=None)
    velocity = transformer(tokens, embeds, torch.tensor([sigma]), ids, return_dict=False)[0]
    squares = velocity.reshape(1, rows, columns, -1, side, side).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(1, -1, rows * side, columns * side)


TRAINING = (
    Training(
        name="training",
        model="krea-2-raw",
        write=lambda folder: write_krea2(folder, turbo=False),
        pipeline="Krea2Pipeline",
        transformer="Krea2Transformer2DModel",
        captions=(
            "a red circle",
            json.dumps({"high_level_description": "two blue squares on a table"}),
            "a red circle",
        ),
        targets=(
            {"module_path": "transformer_blocks.{block}.attn.to_q", "blocks": "all", "rank": 4, "alpha": 8},
            {"module_path": "transformer_blocks.{block}.attn.to_gate", "blocks": "all", "rank": 2},
            {"module_path": "transformer_blocks.0.ff.down", "rank": 3, "alpha": 1.5},
            {"module_path": "text_fusion.refiner_blocks.0.attn.to_v", "rank": 2},
            {"module_path": "time_mod_proj", "rank": 3},
            {"module_path": "txt_in.linear_1", "rank": 2, "alpha": 3},
            {"module_path": "final_layer.linear", "rank": 2},
        ),
        encoded=_encoded,
        velocity=_velocity,
    ),
)

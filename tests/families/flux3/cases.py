"""FLUX.3 image klein: what the tests of all families need to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from support.cases import Component, Pipeline, Settings, Tiny
from support.images import generated, photo
from support.tokenizers import write_json, write_qwen_tokenizer

from families.flux.cases import normal, token_ids
from families.flux2.cases import vae_reference
from mflux.backend import mx
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.autoencoders.flux2 import AutoencoderKLFlux2
from mflux.models.flux3.model.text_encoder import Flux3TextEncoder
from mflux.models.flux3.model.transformer import Flux3Transformer, grid_ids, text_ids

# ---- text encoder

TEXT = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=33, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
)  # fmt: skip
VISION = dict(
    depth=1, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, out_hidden_size=16,
    num_position_embeddings=25, deepstack_visual_indexes=[0],
)  # fmt: skip
_STATES = (4, 8, 12, 16, 20, 24, 28, 32)


def text_reference(*, trimmed: bool = False, **settings):
    """Qwen3-VL; `trimmed` is what copies of it are that hold only what is read."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = TEXT | settings
    vision = VISION | {"out_hidden_size": text["hidden_size"]}
    # No images here, whose tokens have to be some.
    tokens = dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 0)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    model = Qwen3VLForConditionalGeneration(config)
    model.trimmed = trimmed
    return model


def save_text(model, folder: Path) -> Path:
    """As published, or as a copy without the vision tower and the layers that nobody reads."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder)
    if model.trimmed:
        path = folder / "model.safetensors"
        left = ("model.visual.", "model.language_model.layers.32.", "model.language_model.norm.")
        tensors = {name: value for name, value in load_file(path).items() if not name.startswith(left)}
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def text_inputs(model, number: int) -> dict:
    length, padded = ((9, 0), (12, 5))[number]
    return {"ids": token_ids(1, length + padded, 60) + 1, "mask": np.array([[1] * length + [0] * padded])}


def run_text(module, inputs):
    return [module(mx.array(inputs["ids"]), mx.array(inputs["mask"]))]


def run_text_reference(model, inputs):
    import torch

    ids, mask = torch.tensor(inputs["ids"]), torch.tensor(inputs["mask"])
    positions = torch.arange(ids.shape[1])[None].masked_fill(mask == 0, 1)
    found = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False
    ).hidden_states
    return [torch.cat([found[state] for state in _STATES], dim=-1)]


def text_full_size(config):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))


# What the published files hold above the highest hidden state that is read, and beside the language model.
_ABOVE = tuple(
    f".language_model.layers.{layer}.{leaf}.weight"
    for layer in range(32, 36)
    for leaf in (
        "input_layernorm", "post_attention_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
        "self_attn.k_norm", "self_attn.q_norm", "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj",
        "self_attn.v_proj",
    )
)  # fmt: skip
_TOWER = tuple(
    f"visual.{name}.{leaf}"
    for name in (
        "patch_embed.proj", "merger.norm", "merger.linear_fc1", "merger.linear_fc2",
        *(f"deepstack_merger_list.{number}.{layer}" for number in range(3)
          for layer in ("norm", "linear_fc1", "linear_fc2")),
        *(f"blocks.{number}.{layer}" for number in range(24)
          for layer in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")),
    )
    for leaf in ("weight", "bias")
)  # fmt: skip

# ---- transformer

TRANSFORMER = dict(
    in_channels=16, cond_in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=24, timestep_channels=32, axes_dims_rope=[4, 4, 4, 4], flow_map=True,
)  # fmt: skip


def transformer_reference(**settings):
    from diffusers import Flux3Transformer2DModel

    return Flux3Transformer2DModel(**TRANSFORMER | settings)


def transformer_inputs(model, number: int) -> dict:
    """An image with one reference, or with two of other sizes."""
    batch, grid, length, references = (
        (1, (3, 5), 7, [(6, 7)]),
        (3, (6, 2), 11, [(4, 3), (1, 5)]),
    )[number]
    config = model.config
    tokens = sum(rows * columns for rows, columns in references)
    return {
        "latents": normal(1, batch, grid[0] * grid[1], config.in_channels),
        "text": normal(2, batch, length, config.joint_attention_dim),
        "references": normal(3, batch, tokens, config.cond_in_channels),
        # One noise level for each sample, so that none can stand for all.
        "sigma": np.linspace(0.9, 0.3, batch, dtype=np.float32),
        "grids": np.array([grid, *references]),
    }


def run_transformer(module, inputs):
    """Without references, and with them."""
    grid, *sizes = inputs["grids"].tolist()
    sigma = mx.array(inputs["sigma"])
    given = dict(
        sigma=sigma, next_sigma=sigma / 3 if module.config.flow_map else None, prompt_embeds=mx.array(inputs["text"]),
        image_ids=grid_ids(*grid), text_ids=text_ids(inputs["text"].shape[1]),
    )  # fmt: skip
    yield module(mx.array(inputs["latents"]), **given)
    places = mx.concatenate([grid_ids(*size, reference=number) for number, size in enumerate(sizes, start=1)])
    yield module(mx.array(inputs["latents"]), references=mx.array(inputs["references"]), reference_ids=places, **given)


def run_transformer_reference(model, inputs):
    import torch
    from diffusers.modular_pipelines.flux3.before_denoise import Flux3TextRoPEInputsStep, _prepare_image_ids

    grid, *sizes = inputs["grids"].tolist()
    text, sigma = torch.tensor(inputs["text"]), torch.tensor(inputs["sigma"])
    given = dict(
        hidden_states=torch.tensor(inputs["latents"]), encoder_hidden_states=text, timestep=sigma,
        target_timestep=sigma / 3 if model.config.flow_map else None, img_ids=_prepare_image_ids(*grid, 0.5),
        txt_ids=Flux3TextRoPEInputsStep._prepare_text_ids(text), return_dict=False,
    )  # fmt: skip
    (plain,) = model(**given)
    ids = torch.cat([_prepare_image_ids(*size, 0.5, l_coord=-1 - number) for number, size in enumerate(sizes)])
    (beside,) = model(image_cond_hidden_states=torch.tensor(inputs["references"]), image_cond_ids=ids, **given)
    return [plain, beside]


def transformer_full_size(config):
    from diffusers import Flux3Transformer2DModel

    return Flux3Transformer2DModel.from_config(config)


COMPONENTS = (
    Component(
        name="text_encoder",
        module=Flux3TextEncoder,
        reference=text_reference,
        settings={
            "as published": {},
            "a trimmed copy": dict(trimmed=True, hidden_size=24, num_key_value_heads=1, rms_norm_eps=1e-5),
        },
        inputs=text_inputs,
        ours=run_text,
        theirs=run_text_reference,
        save=save_text,
        published={"Fibo-2.0/text_encoder (Qwen3-VL-4B)": 4_437_815_808},
        full_size=text_full_size,
        ignored=(*_ABOVE, *_TOWER, "language_model.norm.weight", "visual.pos_embed.weight"),
    ),
    Component(
        name="transformer",
        module=Flux3Transformer,
        reference=transformer_reference,
        settings={
            "distilled": {},
            "base, three heads": dict(flow_map=False, num_attention_heads=3, num_layers=2, mlp_ratio=2.5),
            "only joint blocks": dict(
                num_layers=0, cond_in_channels=12, attention_head_dim=20, axes_dims_rope=[2, 6, 8, 4], rope_theta=100,
                eps=1e-3,
            ),
        },
        inputs=transformer_inputs,
        ours=run_transformer,
        theirs=run_transformer_reference,
        # Sharp attention: that of references is far from what comes out.
        gains={"norm_q.weight": 2.0, "norm_k.weight": 2.0},
        published={
            "flux-3-image-klein/transformer": 5_548_681_984, "flux-3-image-klein-base/transformer": 5_538_458_368,
        },
        full_size=transformer_full_size,
        swap=dict(
            in_channels=16, cond_in_channels=16, attention_head_dim=8, axes_dims_rope=[2, 2, 2, 2],
            joint_attention_dim=16, timestep_channels=16, num_layers=2, num_single_layers=1,
        ),
    ),
)  # fmt: skip


# ---- whole images

PROMPT = "a large red circle on a Café's wall 🐱 红色"


def write_klein(folder: Path, *, flow_map: bool = True, heads: int = 2, blocks=(1, 2)) -> Path:
    """A tiny model as it is published, by the reference classes."""
    from support.reference import draw

    vocabulary = len(write_qwen_tokenizer(folder / "text_encoder"))
    text = draw(text_reference(vocab_size=vocabulary), 1)
    save_text(text, folder / "text_encoder")
    transformer = transformer_reference(
        in_channels=128, cond_in_channels=128, joint_attention_dim=128, num_attention_heads=heads,
        num_layers=blocks[0], num_single_layers=blocks[1], timestep_channels=256, flow_map=flow_map,
    )  # fmt: skip
    draw(transformer, 2).save_pretrained(folder / "transformer")
    vae = vae_reference(block_out_channels=[8, 8, 16, 16], latent_channels=32)
    draw(vae, 3, {"decoder.conv_out.weight": 0.3}).save_pretrained(folder / "vae")
    kind = "Flux3DistilledModularPipeline" if flow_map else "Flux3ModularPipeline"
    write_json(folder / "modular_model_index.json", {"_class_name": kind})
    return folder


def draw_ours(folder: Path, settings):
    from mflux.models.flux3.variants.edit.flux3_klein_edit import Flux3KleinEdit
    from mflux.models.flux3.variants.txt2img.flux3_klein import Flux3Klein

    settings = dict(settings)
    name = "flux3-image-klein" if settings.pop("flow_map") else "flux3-image-klein-base"
    kind = Flux3KleinEdit if "image_paths" in settings else Flux3Klein
    return generated(kind(model_path=str(folder), model_config=ModelConfig.from_name(name)), **settings)


class ChatTemplate:
    """Of Qwen3-VL, of one user's turn."""

    def __init__(self, folder: Path):
        from transformers import Qwen2Tokenizer

        self.tokenizer = Qwen2Tokenizer.from_pretrained(folder)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt) -> str:
        assert not tokenize and add_generation_prompt
        (turn,) = messages
        return f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n<|im_start|>assistant\n"


@cache
def reference_pipeline(folder: Path, flow_map: bool):
    from diffusers import AutoencoderKLFlux2 as ReferenceVAE
    from diffusers import Flux3Transformer2DModel
    from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3AutoBlocks
    from diffusers.modular_pipelines.flux3.modular_blocks_flux3_distilled import Flux3DistilledAutoBlocks
    from transformers import Qwen3VLForConditionalGeneration

    blocks = Flux3DistilledAutoBlocks() if flow_map else Flux3AutoBlocks()
    # It rewrites the prompt with another model.
    blocks.sub_blocks.pop("prompt_upsampler")
    pipeline = blocks.init_pipeline()
    pipeline.update_components(
        text_encoder=Qwen3VLForConditionalGeneration.from_pretrained(folder / "text_encoder"),
        transformer=Flux3Transformer2DModel.from_pretrained(folder / "transformer"),
        vae=ReferenceVAE.from_pretrained(folder / "vae"),
    )
    pipeline.tokenizer = ChatTemplate(folder / "text_encoder")
    return pipeline


def draw_theirs(folder: Path, settings):
    import torch

    from mflux.models.flux3.latent_creator.flux3_latent_creator import Flux3LatentCreator

    pipeline = reference_pipeline(folder, settings["flow_map"])
    size = {name: settings[name] for name in ("height", "width") if name in settings}
    images = settings.get("image_paths")
    canvas = settings.get("canvas", (size.get("height"), size.get("width")))
    noise = Flux3LatentCreator.create_noise(settings["seed"], *canvas)
    latents = torch.tensor(np.array(Flux3LatentCreator.unpack_latents(noise, *canvas)))
    if not settings["flow_map"]:
        pipeline.guider.guidance_scale = settings.get("guidance", 3.5)
    more = {} if images is None else {"image": images}
    state = pipeline(
        prompt=settings["prompt"], num_inference_steps=settings["num_inference_steps"], latents=latents, **size, **more
    )
    found = state.get("latents").flatten(2).transpose(1, 2)
    return found.numpy(), np.asarray(state.get("images")[0])


def _image(flow_map: bool = True, **settings):
    return dict(seed=3, prompt=PROMPT, num_inference_steps=3, height=48, width=80, flow_map=flow_map) | settings


def _natural(*images, canvas: tuple[int, int], **settings):
    """Without a size: that of the first image, which is generated on a canvas of so many rows and columns."""
    settings = _image(image_paths=list(images), canvas=canvas, **settings)
    del settings["height"], settings["width"]
    return settings


PIPELINES = (
    Pipeline(
        name="images",
        folders={
            "distilled": write_klein,
            "base": lambda folder: write_klein(folder, flow_map=False, heads=3, blocks=(2, 1)),
        },
        pictures={
            "distilled": ("distilled", _image()),
            "one step, no prompt": ("distilled", _image(num_inference_steps=1, height=96, width=32, prompt="")),
            "a prompt of more than 80 tokens": ("distilled", _image(prompt="a blue square, " * 40, seed=2**63)),
            "base": ("base", _image(False, num_inference_steps=5)),
            "base, more guidance": ("base", _image(False, guidance=5.0, prompt="")),
            "base, no guidance": ("base", _image(False, guidance=1.0)),
            "an edit, the image's size": ("distilled", _natural(photo(70, 90), canvas=(96, 80))),
            "an edit of a small image": ("distilled", _natural(photo(12, 37), canvas=(64, 64))),
            "an edit at a size": ("base", _image(False, image_paths=[photo(64, 96)], height=32, width=64)),
            "two references": (
                "distilled", _natural(photo(83, 64), photo(133, 71), canvas=(64, 80), num_inference_steps=2),
            ),
            "two references at a size": (
                "base", _image(False, image_paths=[photo(64, 64), photo(70, 90)], height=64, width=48),
            ),
        },
        ours=lambda folder, settings: draw_ours(folder, {k: v for k, v in settings.items() if k != "canvas"}),
        theirs=draw_theirs,
    ),
)  # fmt: skip


# ---- a model that needs no reference


def write_tiny(folder: Path, *, wide: bool = False, changes: Mapping[str, Settings] | None = None) -> Path:
    """A whole model of random weights, in the published layout; `changes` are to configurations, by folder."""
    from support.tiny import published, write_components

    width = 64 if wide else 32
    vocabulary = len(write_qwen_tokenizer(folder / "text_encoder"))
    write_json(folder / "modular_model_index.json", {"_class_name": "Flux3DistilledModularPipeline"})
    parts = {
        "text_encoder": (Flux3TextEncoder, {
            "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl",
            "text_config": {
                "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width,
                "num_hidden_layers": 33, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": width,
                "rope_scaling": {"mrope_section": [width // 8] * 3, "rope_type": "default", "rope_theta": 5e6},
            },
        }),
        "transformer": (Flux3Transformer, {
            "_class_name": "Flux3Transformer2DModel", "num_layers": 1, "num_single_layers": 2,
            "attention_head_dim": width // 2, "num_attention_heads": 2, "axes_dims_rope": [width // 8] * 4,
            "joint_attention_dim": 8 * width, "flow_map": True,
        }),
        "vae": (AutoencoderKLFlux2, {
            "_class_name": "AutoencoderKLFlux2", "block_out_channels": [8, 8, 16, width], "norm_num_groups": 4,
            "layers_per_block": 1, "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        }),
    }  # fmt: skip

    def weights(module, *, seed: int) -> dict[str, mx.array]:
        tensors = published(module, seed=seed)
        if isinstance(module, AutoencoderKLFlux2):
            tensors["bn.running_var"] = mx.abs(tensors["bn.running_var"]) + 0.5
            tensors["bn.num_batches_tracked"] = mx.array(7)
        return tensors

    return write_components(folder, parts, changes=changes, draw=weights)


_SOURCE = Path(__file__).parents[3] / "docs" / "demo.png"

TINY = (
    Tiny(
        write=write_tiny,
        command="generate-flux3",
        base_model="flux3-image-klein",
        pipeline="mflux.models.flux3.variants.txt2img.flux3_klein:Flux3Klein",
        refused=(
            ("transformer", {"_class_name": "Flux2Transformer2DModel"}, "not FLUX.3's transformer"),
            ("transformer", {"in_channels": 64}, "a transformer that takes 64;"),
            ("transformer", {"axes_dims_rope": [8, 8]}, "axes_dims_rope"),
            ("transformer", {"flow_map": False}, "--base-model flux3-image-klein-base"),
            ("vae", {"latent_channels": 16}, "64 latent channels for every 16 pixels"),
        ),
        refused_later=(
            ("text_encoder", {"text_config": {"num_hidden_layers": 31}}, "hidden states 4, 8"),
            ("text_encoder", {"text_config": {"model_type": "qwen3"}}, "qwen3_vl_text"),
        ),
    ),
    Tiny(
        write=write_tiny,
        command="generate-flux3-edit",
        base_model="flux3-image-klein",
        words=("--image-paths", _SOURCE, _SOURCE),
        pipeline="mflux.models.flux3.variants.edit.flux3_klein_edit:Flux3KleinEdit",
        generate={"image_paths": [_SOURCE, _SOURCE]},
    ),
)

"""Z-Image: what the tests of all families need to know of it."""

from __future__ import annotations

import copy
import json
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from support.cases import Component, Pipeline, Tiny, Training
from support.images import generated, noise, opened, photo
from support.tokenizers import write_json, write_qwen_tokenizer

from families.flux.cases import normal, token_ids
from mflux.backend import mx
from mflux.checkpoints.loading import load_component
from mflux.models.common.networks.autoencoders.kl import AutoencoderKL
from mflux.models.z_image.latent_creator import ZImageLatentCreator
from mflux.models.z_image.layouts import TURBO_SHIFT, static_schedule
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
    from support.reference import draw

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
    dtype = module.control_all_x_embedder["2-1"].weight.dtype
    if dtype != mx.float32:
        base = copy.deepcopy(base)
        base.set_dtype(dtype)
    arrays = {name: mx.array(value) for name, value in inputs.items() if name != "sizes"}
    control, latents = arrays.pop("control"), arrays.pop("latents")
    hints = module(base, latents, control=control, strength=0.7, **arrays)
    yield from hints.values()
    yield base(latents, hints=hints, **arrays)


def run_controlnet_reference(model, inputs):
    import torch

    base, dtype = transformers(*inputs["sizes"])[0], model.dtype
    if dtype != torch.float32:
        base = copy.deepcopy(base).to(dtype)
    own = vars(model)["_modules"].copy(), vars(model)["_parameters"].copy()
    control = torch.tensor(inputs["control"]).to(dtype)
    rest = control.new_zeros(len(control), model.config.control_in_dim - control.shape[1], *control.shape[2:])
    arguments = (
        [torch.tensor(latents).to(dtype)[:, None] for latents in inputs["latents"]],
        torch.tensor(inputs["timestep"]),
        [torch.tensor(embeds).to(dtype) for embeds in inputs["prompt_embeds"]],
    )
    hints = type(model).from_transformer(model, base)(
        *arguments, list(torch.cat([control, rest], dim=1)[:, :, None]), 0.7
    )
    prediction = base(*arguments, controlnet_block_samples=hints).sample
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


# ---- whole pictures

_INDEX = {
    "_class_name": "ZImagePipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_z_image(folder: Path, *, seed: int = 0, shift: float = 3.0, controlnet: dict | None = None, **vae) -> Path:
    """A complete tiny folder, with a ControlNet if its settings are given."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from support.reference import draw, vae_model

    vocabulary = len(write_qwen_tokenizer(folder / "tokenizer"))
    text_encoder = text_encoder_reference(vocab_size=vocabulary, hidden_size=20)
    # Of the published class the files hold `model.…`, and no head.
    draw(text_encoder, seed + 1).save_pretrained(folder / "text_encoder")
    draw(transformer_reference(in_channels=16), seed + 2).save_pretrained(folder / "transformer")
    vae_model(seed + 3, block_out_channels=[8, 8, 16, 16], latent_channels=16, **vae).save_pretrained(folder / "vae")
    if controlnet is not None:
        model = controlnet_reference(**controlnet)
        # Hints that steer and do not drown.
        draw(model, seed + 4, {"after_proj.weight": 0.3}).save_pretrained(folder / "controlnet")
    FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(_INDEX))
    return folder


@cache
def pipeline_reference(folder: Path, name: str):
    import diffusers
    import torch
    from transformers import AutoTokenizer, Qwen3Model

    parts = dict(
        text_encoder=Qwen3Model.from_pretrained(folder / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        transformer=diffusers.ZImageTransformer2DModel.from_pretrained(folder / "transformer"),
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    )
    if name == "ZImageControlNetPipeline":
        parts["controlnet"] = diffusers.ZImageControlNetModel.from_pretrained(folder / "controlnet")
    pipeline = getattr(diffusers, name)(**parts)
    assert all(part.dtype == torch.float32 for part in parts.values() if isinstance(part, torch.nn.Module))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawing(width: int, height: int, path: Path) -> Path:
    """A picture with edges, in a file."""
    import PIL.Image
    import PIL.ImageDraw

    image = PIL.Image.new("RGB", (width, height), "white")
    pencil = PIL.ImageDraw.Draw(image)
    pencil.ellipse((width // 5, height // 6, width // 2, height // 2), fill="navy")
    pencil.polygon([(width // 2, height - 5), (width - 4, height // 3), (width - 9, height - 8)], fill="orange")
    image.save(path)
    return path


def draw_z_image(folder: Path, settings):
    from mflux.models.common.config import ModelConfig
    from mflux.models.z_image import ZImage

    return generated(ZImage(model_path=str(folder), model_config=ModelConfig.z_image()), **settings)


def draw_z_image_reference(folder: Path, settings):
    latents = noise(ZImageLatentCreator, settings)
    common = {name: settings[name] for name in ("height", "width", "num_inference_steps", "prompt")}
    # All that the pipeline has no argument for is left out of it: its own defaults are what a picture is compared with.
    common |= {name: settings[name] for name in ("cfg_normalization", "cfg_truncation") if name in settings}
    common |= {"guidance_scale": settings["guidance"], "negative_prompt": settings.get("negative_prompt")}
    if "image_path" in settings:
        return from_picture_reference(folder, settings, common)
    pipeline = pipeline_reference(folder, "ZImagePipeline")
    found = pipeline(**common, latents=latents, output_type="latent").images
    return found, np.asarray(pipeline(**common, latents=latents).images[0])


def from_picture_reference(folder: Path, settings, common):
    """The reference keeps as much as its strength leaves; it draws the noise itself, so that is put in its place."""
    from unittest import mock

    import PIL.Image

    pipeline = pipeline_reference(folder, "ZImageImg2ImgPipeline")
    steps = settings["num_inference_steps"]
    begin = max(1, int(steps * settings["image_strength"]))
    size = settings["width"], settings["height"]
    image = settings["image_path"].resize(size, PIL.Image.Resampling.LANCZOS)
    arguments = common | {"image": image, "strength": (steps - begin) / steps}
    module = "diffusers.pipelines.z_image.pipeline_z_image_img2img"

    def latents_of(encoded, *_, **__):
        return encoded.latent_dist.mode()

    with (
        mock.patch(f"{module}.randn_tensor", lambda *_, **__: noise(ZImageLatentCreator, settings)),
        mock.patch(f"{module}.retrieve_latents", latents_of),
    ):
        found = pipeline(**arguments, output_type="latent").images
        return found, np.asarray(pipeline(**arguments).images[0])


def draw_controlled(folder: Path, settings):
    from mflux.models.z_image import ZImageTurboControlnet
    from mflux.models.z_image.variants.controlnet import ControlSpec, ControlType

    settings = dict(settings)
    path = drawing(*settings.pop("control_size"), folder / "control.png")
    controls = [ControlSpec(ControlType.canny, path, settings.pop("strength"))]
    return generated(ZImageTurboControlnet(model_path=str(folder)), controls=controls, **settings)


def draw_controlled_reference(folder: Path, settings):
    import PIL.Image

    from mflux.models.common.controls.canny import canny

    pipeline = pipeline_reference(folder, "ZImageControlNetPipeline")
    size = settings["width"], settings["height"]
    picture = opened(drawing(*settings["control_size"], folder / "control.png")).convert("RGB")
    edges = canny(np.asarray(picture.resize(size, PIL.Image.Resampling.LANCZOS).convert("L")))
    assert 0.02 < (edges > 0).mean() < 0.5
    common = dict(
        prompt=settings["prompt"], height=size[1], width=size[0], num_inference_steps=settings["num_inference_steps"],
        guidance_scale=0, control_image=PIL.Image.fromarray(edges).convert("RGB"),
        controlnet_conditioning_scale=settings["controlnet_strength"] * settings["strength"],
    )  # fmt: skip
    found = pipeline(**common, latents=noise(ZImageLatentCreator, settings), output_type="latent").images
    return found, np.asarray(pipeline(**common, latents=noise(ZImageLatentCreator, settings)).images[0])


def _picture(**settings):
    return (
        dict(seed=3, prompt="a red circle, naïve", num_inference_steps=3, height=64, width=96, guidance=4.0) | settings
    )


def _controlled(**settings):
    picture = _picture(control_size=(90, 50), strength=1.0, controlnet_strength=0.8) | settings
    del picture["guidance"]
    return picture


PIPELINES = (
    Pipeline(
        name="pictures",
        folders={
            "turbo": lambda folder: write_z_image(folder),
            "base": lambda folder: write_z_image(folder, seed=20, shift=6.0),
        },
        pictures={
            "not guided": ("turbo", _picture(guidance=0.0)),
            "guided": ("base", _picture()),
            "guided away from words, higher than wide": (
                "base",
                _picture(negative_prompt="a green square " * 9, num_inference_steps=5, height=96, width=48),
            ),
            "a little guided": ("base", _picture(guidance=0.5, num_inference_steps=2)),
            "normalized": ("base", _picture(cfg_normalization=0.9, seed=8)),
            "guided until a time": ("base", _picture(cfg_truncation=0.2, num_inference_steps=4)),
            "no words, one step": ("turbo", _picture(prompt="", guidance=0.0, num_inference_steps=1)),
            "from a picture": (
                "turbo",
                _picture(guidance=0.0, image_path=photo(120, 77), image_strength=0.4, num_inference_steps=5),
            ),
            "from a picture, guided": (
                "base",
                _picture(image_path=photo(64, 64), image_strength=0.75, num_inference_steps=4),
            ),
        },
        ours=draw_z_image,
        theirs=draw_z_image_reference,
    ),
    Pipeline(
        name="controlled pictures",
        folders={
            "2.1": lambda folder: write_z_image(folder, controlnet=dict(control_in_dim=33)),
            "1.0": lambda folder: write_z_image(
                folder,
                seed=40,
                controlnet=dict(add_control_noise_refiner=None, control_refiner_layers_places=None, control_in_dim=16),
            ),
        },
        pictures={
            "after edges": ("2.1", _controlled()),
            "after edges a little, higher than wide": (
                "2.1",
                _controlled(strength=0.4, height=80, width=48, num_inference_steps=4),
            ),
            "1.0": ("1.0", _controlled(seed=5)),
        },
        ours=draw_controlled,
        theirs=draw_controlled_reference,
    ),
)


# ---- a model for the tests that need no reference


def write_tiny(
    folder: Path,
    *,
    wide: bool = False,
    controlnet: bool = False,
    shift: float = TURBO_SHIFT,
    changes: dict[str, dict] | None = None,
    dtype: mx.Dtype = mx.float32,
) -> Path:
    """`changes` to the configurations, by component; `dtype` is what the files hold."""
    from support.tiny import published, write_components

    vocabulary = len(write_qwen_tokenizer(folder / "tokenizer"))
    write_json(folder / "model_index.json", _INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", static_schedule(shift))
    # Three thirds of 64 make 192, whose feed-forward is 512 wide: all divide by 64.
    dim, text = (192, 64) if wide else (48, 24)
    common = dict(dim=dim, n_heads=3, n_kv_heads=3, n_refiner_layers=1)
    parts = {
        "text_encoder": (ZImageTextEncoder.saved_class, {
            "model_type": "qwen3", "vocab_size": vocabulary, "hidden_size": text, "intermediate_size": 2 * text,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": text // 4,
        }),
        "transformer": (ZImageTransformer, {
            "_class_name": "ZImageTransformer2DModel", "axes_dims": [dim // 12, dim // 8, dim // 8], "n_layers": 2,
            "cap_feat_dim": text, **common,
        }),
        "vae": (AutoencoderKL, {
            "_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4,
            "layers_per_block": 1, "latent_channels": 16, "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        }),
    }  # fmt: skip
    if controlnet:
        parts["controlnet"] = ZImageControlNet, {
            "_class_name": "ZImageControlNetModel", "control_layers_places": [0, 1],
            "control_refiner_layers_places": [0], "control_in_dim": 33, **common,
        }  # fmt: skip
    return write_components(folder, parts, changes=changes, draw=partial(published, dtype=dtype))


TINY = (
    Tiny(
        write=write_tiny,
        command="generate-z-image-turbo",
        base_model="z-image-turbo",
        pipeline="mflux.models.z_image.variants.z_image:ZImage",
        refused=(
            ("transformer", {"_class_name": "FluxTransformer2DModel"}, "not Z-Image's transformer"),
            ("transformer", {"in_channels": 4}, "takes 4"),
            ("vae", {"latent_channels": 4}, "4 latent channels"),
        ),
        refused_later=(
            ("transformer", {"siglip_feat_dim": 12}, "Omni"),
            ("transformer", {"axes_dims": [8, 8]}, "axes_dims"),
            ("text_encoder", {"model_type": "llama"}, "qwen3"),
        ),
    ),
    Tiny(
        write=write_tiny,
        command="generate-z-image",
        base_model="z-image",
        words=("--guidance", "3", "--negative-prompt", "a green square"),
        pipeline="mflux.models.z_image.variants.z_image:ZImage",
        generate={"guidance": 3.0, "negative_prompt": "a green square"},
    ),
)


# ---- training


def _encoded(folder: Path, image, prompt: str, width: int, height: int, source):
    import torch

    pipeline = pipeline_reference(folder, "ZImagePipeline")
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        vae = pipeline.vae
        mode = vae.encode(pipeline.image_processor.preprocess(image)).latent_dist.mode()
        latents = (mode - vae.config.shift_factor) * vae.config.scaling_factor
    return latents, {"prompt_embeds": embeds[0][None]}


def _velocity(transformer, latents, sigma, cond, width: int, height: int, guidance: float):
    import torch

    (sample,) = transformer([latents.transpose(0, 1)], torch.tensor([1 - sigma]), [cond["prompt_embeds"][0]]).sample
    return -sample.transpose(0, 1)


TRAINING = (
    Training(
        name="training",
        model="z-image",
        write=lambda folder: write_z_image(folder, shift=6.0),
        pipeline="ZImagePipeline",
        transformer="ZImageTransformer2DModel",
        targets=(
            {"module_path": "layers.{block}.attention.to_q", "blocks": "all", "rank": 4, "alpha": 8},
            {"module_path": "layers.{block}.feed_forward.w1", "blocks": {"start": 0, "end": 2}, "rank": 2},
            {"module_path": "layers.0.adaLN_modulation.0", "rank": 3, "alpha": 1.5},
            {"module_path": "context_refiner.{block}.attention.to_out.0", "blocks": {"indices": [0]}, "rank": 4},
            {"module_path": "noise_refiner.{block}.attention.to_k", "blocks": "all", "rank": 4},
            {"module_path": "cap_embedder.1", "rank": 2, "alpha": 3},
            {"module_path": "all_final_layer.2-1.linear", "rank": 2},
        ),
        encoded=_encoded,
        velocity=_velocity,
        prefix="diffusion_model",
    ),
)

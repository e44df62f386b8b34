"""Qwen-Image and Qwen-Image-Edit: what the tests of all families need to know of them."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
from support.cases import Component, Pipeline, Tiny, Training
from support.images import generated, noise, photo, pipeline_reference
from support.tokenizers import QWEN_VL_SPECIAL, spelled, write_json, write_qwen_tokenizer

from mflux.backend import mx
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.autoencoders.wan import AutoencoderWan
from mflux.models.common.networks.qwen2_5_vl import Qwen25VLEncoder, Qwen25VLTextEncoder
from mflux.models.qwen.latent_creator.qwen_latent_creator import QwenLatentCreator
from mflux.models.qwen.model.transformer import QwenTransformer


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


# ---- transformer


def transformer_reference(**settings):
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        **dict(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=[4, 6, 6],
        )
        | settings
    )


def transformer_inputs(model, number: int) -> dict:
    batch, length, grids = ((1, 7, [(3, 5), (4, 2)]), (3, 11, [(6, 2), (1, 3), (5, 9)]))[number]
    config = model.config
    return {
        "latents": normal(1, batch, sum(rows * columns for rows, columns in grids), config.in_channels),
        "text": normal(2, batch, length, config.joint_attention_dim),
        # One noise level for each sample, so that none can stand for all.
        "sigma": np.linspace(0.9, 0.3, batch, dtype=np.float32),
        "grids": np.array(grids),
    }


def run_transformer(module, inputs):
    arrays = {name: mx.array(inputs[name]) for name in ("latents", "sigma", "text")}
    grids = [tuple(grid) for grid in inputs["grids"].tolist()]
    yield module(arrays["latents"], sigma=arrays["sigma"], prompt_embeds=arrays["text"], grids=grids)
    first = grids[0][0] * grids[0][1]
    yield module(arrays["latents"][:, :first], sigma=arrays["sigma"], prompt_embeds=arrays["text"], grids=grids[:1])


def run_transformer_reference(model, inputs):
    import torch

    shapes = [(1, *grid) for grid in inputs["grids"].tolist()]
    for count in (len(shapes), 1):
        length = sum(rows * columns for _, rows, columns in shapes[:count])
        yield model(
            hidden_states=torch.tensor(inputs["latents"][:, :length]),
            encoder_hidden_states=torch.tensor(inputs["text"]),
            timestep=torch.tensor(inputs["sigma"]),
            img_shapes=[shapes[:count]] * len(inputs["latents"]),
        ).sample


def transformer_full_size(config):
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel.from_config(config)


# ---- text encoder, with and without eyes

_PICTURE, _START, _END, _VIDEO = 60, 61, 62, 63


def encoder_reference(**settings):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-6, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 2, 1]},
    )  # fmt: skip
    text |= settings.get("text", {})
    vision = dict(
        depth=3, hidden_size=32, intermediate_size=40, num_heads=2, patch_size=2, window_size=8,
        fullatt_block_indexes=[1], out_hidden_size=text["hidden_size"],
    )  # fmt: skip
    names = ("image_token_id", "vision_start_token_id", "vision_end_token_id", "video_token_id")
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision | settings.get("vision", {}),
        **dict(zip(names, settings.get("ids", (_PICTURE, _START, _END, _VIDEO)), strict=True)),
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    return Qwen2_5_VLForConditionalGeneration(config)


def text_inputs(model, number: int) -> dict:
    return {"ids": np.random.default_rng(number).integers(0, 59, (9, 170)[number])}


def encoder_inputs(model, number: int) -> dict:
    """Pictures of whole windows and of parts of some; their tokens stand between words."""
    grids = [(4, 10)] if number == 0 else [(6, 14), (8, 2)]
    vision = model.config.vision_config
    ids = []
    for rows, columns in grids:
        ids += [7, 3, _START, *[_PICTURE] * (rows * columns // 4), _END, 5]
    count = sum(rows * columns for rows, columns in grids)
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {"ids": np.array([*ids, 11, 12]), "patches": normal(1, count, width), "grids": np.array(grids)}


def run_text(module, inputs):
    return [module(inputs["ids"].tolist())]


def run_encoder(module, inputs):
    grids = [tuple(grid) for grid in inputs["grids"].tolist()]
    yield module(inputs["ids"].tolist(), mx.array(inputs["patches"]), grids)
    yield module([3, 5, 4])


def run_text_reference(model, inputs):
    import torch

    return [model.model(torch.tensor(inputs["ids"])[None]).last_hidden_state]


def run_encoder_reference(model, inputs):
    import torch

    ids = torch.tensor(inputs["ids"])[None]
    seeing = model.model(
        ids,
        pixel_values=torch.tensor(inputs["patches"]),
        image_grid_thw=torch.tensor([(1, *grid) for grid in inputs["grids"].tolist()]),
        # Without it, the reference would give a picture's tokens the positions of text.
        mm_token_type_ids=(ids == _PICTURE).int(),
    )
    return [seeing.last_hidden_state, model.model(torch.tensor([[3, 5, 4]])).last_hidden_state]


def encoder_full_size(config):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))


def encoder_name(name: str) -> str:
    """transformers 5 puts language model and vision tower below `model` on loading."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


# ---- pairs that cannot change the output


def same_sum_in_a_resnet(first: str, second: str) -> bool:
    """A residual block adds its last convolution to its shortcut, and with them their biases."""
    blocks = {name.removesuffix(".conv2.bias").removesuffix(".conv_shortcut.bias") for name in (first, second)}
    ends = {name.rpartition(".")[0].rpartition(".")[2] for name in (first, second)}
    return len(blocks) == 1 and ends == {"conv2", "conv_shortcut"} and first.endswith("bias")


def last_text(first: str, second: str) -> bool:
    """What the last block does with the text's queries and after its attention is read by nobody."""
    unread = ("attn.add_q_proj.", "attn.norm_added_q.", "attn.to_add_out.", "txt_mlp.")
    block = f"transformer_blocks.{_NARROW['num_layers'] - 1}."
    return all(name.startswith(tuple(block + part for part in unread)) for name in (first, second))


_VAE = dict(
    module=AutoencoderWan,
    inputs=vae_inputs,
    ours=run_vae,
    theirs=run_vae_reference,
    gains={"decoder.conv_out.weight": 0.3},
    ignored=(".time_conv.weight", ".time_conv.bias"),
    neutral=(same_sum_in_a_resnet,),
)
# All widths equal where the architecture allows it, so that as many tensors as can be are of the same shape.
_NARROW = dict(
    in_channels=16, attention_head_dim=8, num_attention_heads=2, axes_dims_rope=[2, 2, 4], joint_attention_dim=16,
    num_layers=2,
)  # fmt: skip
_TRANSFORMER = dict(
    module=QwenTransformer,
    reference=transformer_reference,
    inputs=transformer_inputs,
    ours=run_transformer,
    theirs=run_transformer_reference,
    neutral=(last_text,),
)
_ENCODER = dict(
    reference=encoder_reference,
    settings={
        "two heads to a key": {},
        "other widths": dict(
            text=dict(
                num_attention_heads=2,
                num_key_value_heads=1,
                hidden_size=48,
                num_hidden_layers=3,
                rope_parameters={"rope_type": "default", "rope_theta": 5e5, "mrope_section": [4, 3, 5]},
            ),
            vision=dict(num_heads=4, depth=2, fullatt_block_indexes=[0], window_size=16, out_hidden_size=48),
        ),
    },
    published_name=encoder_name,
)
_SQUARE = dict(
    text=dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, rope_parameters={
        "rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 2, 1]}),
    vision=dict(hidden_size=16, intermediate_size=16, depth=2, num_heads=2, out_hidden_size=16),
)  # fmt: skip

COMPONENTS = (
    Component(
        name="text_encoder",
        module=Qwen25VLTextEncoder,
        inputs=text_inputs,
        ours=run_text,
        theirs=run_text_reference,
        swap=_SQUARE,
        **_ENCODER,
    ),
    Component(
        name="text_encoder with pictures",
        module=Qwen25VLEncoder,
        inputs=encoder_inputs,
        ours=run_encoder,
        theirs=run_encoder_reference,
        published={"Qwen-Image/text_encoder (Qwen2.5-VL-7B)": 8_292_166_656},
        full_size=encoder_full_size,
        ignored=("lm_head.weight",),
        swap=_SQUARE,
        **_ENCODER,
    ),
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
    Component(
        name="transformer",
        settings={
            "two layers": {},
            "other axes": dict(
                attention_head_dim=20, num_attention_heads=3, axes_dims_rope=[2, 8, 10], num_layers=1, patch_size=1
            ),
            "as many channels out as in": dict(out_channels=None, num_layers=3, joint_attention_dim=40),
        },
        published={"Qwen-Image/transformer": 20_430_401_088},
        full_size=transformer_full_size,
        swap=_NARROW,
        neutral_pairs=4,
        **_TRANSFORMER,
    ),
    Component(
        name="transformer of Edit-2511",
        settings={
            "pictures without noise": dict(zero_cond_t=True),
            "one layer": dict(zero_cond_t=True, num_layers=1, num_attention_heads=1),
        },
        swap=_NARROW | dict(zero_cond_t=True),
        neutral_pairs=4,
        **_TRANSFORMER,
    ),
)


# ---- whole pictures

PROMPT = "a Café in Zürich, 4k, 猫 🐱"


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Bytes, two pairs and the special tokens; returns all ids."""
    options = dict(pairs=spelled(["the"]), added=QWEN_VL_SPECIAL)
    return write_qwen_tokenizer(folder, **options, unk_token="<|endoftext|>", model_max_length=4096)


def small_encoder(ids: dict[str, int], **text):
    """Shown as many pixels to a patch as the published one, since the picture processor's sizes follow from them."""
    return dict(
        text=dict(vocab_size=300) | text,
        vision=dict(patch_size=14, window_size=112),
        ids=[ids[token] for token in ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")],
    )


def write_qwen(folder: Path, *, kind: str = "QwenImagePipeline", scheduler: dict | None = None, **transformer) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from support.reference import draw

    ids = write_tokenizer(folder / "tokenizer")
    encoder = draw(encoder_reference(**small_encoder(ids)), 1)
    encoder.save_pretrained(folder / "text_encoder")
    model = transformer_reference(in_channels=64, out_channels=16, joint_attention_dim=32, **transformer)
    draw(model, 2).save_pretrained(folder / "transformer")
    vae = vae_reference(base_dim=4, dim_mult=[1, 2, 2, 2], temperal_downsample=[False, True, True], z_dim=16)
    draw(vae, 3, {"decoder.conv_out.weight": 0.2}).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(
        **dict(
            base_image_seq_len=256, base_shift=0.5, max_image_seq_len=8192, max_shift=0.9, shift=1.0,
            shift_terminal=0.02, use_dynamic_shifting=True,
        ) | (scheduler or {})
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    index = {
        "_class_name": kind,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def draw_qwen(folder: Path, settings):
    from mflux.models.qwen.variants.txt2img.qwen_image import QwenImage

    return generated(QwenImage(model_path=str(folder), model_config=ModelConfig.qwen_image()), **settings)


def draw_qwen_reference(folder: Path, settings):
    pipeline = pipeline_reference(folder, "QwenImagePipeline")
    if "image_path" in settings:
        return from_picture_reference(pipeline, settings)
    guidance = settings["guidance"]
    common = dict(
        prompt=settings["prompt"],
        negative_prompt=settings.get("negative_prompt", " ") if guidance > 1 else None,
        true_cfg_scale=guidance,
        height=settings["height"],
        width=settings["width"],
        num_inference_steps=settings["num_inference_steps"],
        latents=noise(QwenLatentCreator, settings),
        # It would leave out what comes after 512, and encodes twice as many.
        max_sequence_length=1024,
    )
    latents = pipeline(**common, output_type="latent").images
    return latents, np.asarray(pipeline(**common, output_type="pil").images[0])


def from_picture_reference(pipeline, settings):
    """The reference counts strength the other way round and draws from the posterior: its parts, put together here."""
    import torch
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    vae, scheduler, steps = pipeline.vae, pipeline.scheduler, settings["num_inference_steps"]
    height, width = settings["height"], settings["width"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (vae.config.latents_mean, vae.config.latents_std))
    pixels = pipeline.image_processor.preprocess(settings["image_path"], height=height, width=width)
    with torch.no_grad():
        encoded = (vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
        picture = pipeline._pack_latents(encoded, 1, 16, height // 8, width // 8)
        mu = calculate_shift(picture.shape[1], 256, 8192, 0.5, 0.9)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
        begin = max(1, int(steps * settings["image_strength"]))
        sigmas = scheduler.sigmas
        latents = (1 - sigmas[begin]) * picture + sigmas[begin] * noise(QwenLatentCreator, settings)
        embeds, _ = pipeline.encode_prompt(settings["prompt"])
        for step in range(begin, steps):
            velocity = pipeline.transformer(
                hidden_states=latents,
                encoder_hidden_states=embeds,
                timestep=sigmas[step][None],
                img_shapes=[[(1, height // 16, width // 16)]],
            ).sample
            latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
        unpacked = pipeline._unpack_latents(latents, height, width, 8)
        decoded = vae.decode(unpacked * std[:, None] + mean[:, None]).sample[:, :, 0]
    return latents, np.asarray(pipeline.image_processor.postprocess(decoded, output_type="pil")[0])


# A million pixels, which both programs encode pictures at, would take a minute each.
_AREA = 192 * 192


def draw_edit(folder: Path, settings):
    from mflux.models.qwen.variants.edit import qwen_image_edit

    with patch.object(qwen_image_edit, "_AREA", _AREA):
        pipeline = qwen_image_edit.QwenImageEdit(model_path=str(folder), model_config=ModelConfig.qwen_image_edit())
        return generated(pipeline, **settings)


class ReferenceProcessor:
    """What the reference's processor does, which cannot be built without torchvision."""

    def __init__(self, tokenizer):
        from transformers import Qwen2VLImageProcessorPil

        self.tokenizer = tokenizer
        self.images = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12_845_056)

    def __call__(self, text, images, **_):
        import torch
        from transformers import BatchFeature

        seen = self.images(images=images, return_tensors="pt")
        pieces = text[0].split("<|image_pad|>")
        spread = ["<|image_pad|>" * (int(grid.prod()) // 4) for grid in seen["image_grid_thw"]]
        whole = pieces[0] + "".join(map("".join, zip(spread, pieces[1:], strict=True)))
        ids = torch.tensor([self.tokenizer(whole)["input_ids"]])
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids), **seen})


@cache
def edit_reference(folder: Path, name: str):
    """The reference, which since transformers 5 forgets to say which tokens are a picture's: the encoder would give
    them the positions of text, on which it was not trained."""
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "processor"}))
    pipeline = getattr(diffusers, name).from_pretrained(folder, processor=None)
    pipeline.register_modules(processor=ReferenceProcessor(pipeline.tokenizer))
    pipeline.set_progress_bar_config(disable=True)
    encoder = pipeline.text_encoder
    forward, token = encoder.forward, encoder.config.image_token_id
    encoder.forward = lambda input_ids, **rest: forward(
        input_ids=input_ids, mm_token_type_ids=(input_ids == token).int(), **rest
    )
    return pipeline


def draw_edit_reference(folder: Path, settings):
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = edit_reference(folder, name)
    guidance, pictures = settings["guidance"], settings["image_paths"]
    module = sys.modules[type(pipeline).__module__]
    last = {}

    def small(area, ratio):
        return dimensions(_AREA if area == 1024 * 1024 else area, ratio)

    def keep(_, step, timestep, values):
        last.update(values)
        return values

    dimensions = module.calculate_dimensions
    with patch.object(module, "calculate_dimensions", small):
        picture = pipeline(
            image=pictures if name.endswith("PlusPipeline") else pictures[0],
            prompt=settings["prompt"],
            negative_prompt=settings.get("negative_prompt", " ") if guidance > 1 else None,
            true_cfg_scale=guidance,
            height=settings.get("height"),
            width=settings.get("width"),
            num_inference_steps=settings["num_inference_steps"],
            latents=noise(QwenLatentCreator, settings),
            callback_on_step_end=keep,
        ).images[0]
    return last["latents"], np.asarray(picture)


def _edit(*pictures, **settings):
    return _picture(**dict(image_paths=list(pictures), num_inference_steps=2) | settings)


def _picture(**settings):
    return dict(seed=3, prompt=PROMPT, num_inference_steps=3, height=64, width=96, guidance=4.0) | settings


PIPELINES = (
    Pipeline(
        name="pictures",
        folders={
            "two layers": write_qwen,
            "another schedule": lambda folder: write_qwen(
                folder, num_layers=1, scheduler=dict(max_shift=1.3, shift_terminal=None)
            ),
        },
        pictures={
            "guided": ("two layers", _picture()),
            "guided away from words": (
                "two layers",
                _picture(negative_prompt="blurry, ugly", num_inference_steps=5, height=80, width=32, guidance=2.5),
            ),
            "not guided": ("two layers", _picture(guidance=1.0, num_inference_steps=7, seed=9)),
            "of an empty prompt": ("two layers", _picture(prompt="", num_inference_steps=2)),
            "of a prompt that is too long": ("another schedule", _picture(prompt="the cat " * 300, guidance=1.0)),
            "from a picture": (
                "two layers",
                _picture(guidance=1.0, image_path=photo(70, 40), image_strength=0.5, num_inference_steps=5),
            ),
        },
        ours=draw_qwen,
        theirs=draw_qwen_reference,
    ),
    Pipeline(
        name="edits",
        folders={
            "2509": lambda folder: write_qwen(folder, kind="QwenImageEditPlusPipeline"),
            "2511": lambda folder: write_qwen(folder, kind="QwenImageEditPlusPipeline", zero_cond_t=True),
            "first": lambda folder: write_qwen(folder, kind="QwenImageEditPipeline", num_layers=1),
        },
        pictures={
            "one picture": ("2509", _edit(photo(50, 80), guidance=2.5)),
            "two pictures, not guided": ("2509", _edit(photo(90, 60), photo(64, 64), guidance=1.0)),
            "two pictures, free of noise": (
                "2511",
                _edit(photo(60, 90), photo(120, 40), negative_prompt="blurry", height=48, width=80),
            ),
            "first release": ("first", _edit(photo(80, 60), guidance=1.0)),
        },
        ours=draw_edit,
        theirs=draw_edit_reference,
    ),
)


# ---- models that need no reference


def write_tiny(folder: Path, *, wide: bool = False, text: dict | None = None, vision: dict | None = None) -> Path:
    """A whole model of random weights, in the published layout; `text` and `vision` change the text encoder."""
    from support.tiny import write_components

    width = 64 if wide else 32
    ids = write_tokenizer(folder / "tokenizer")
    write_json(folder / "model_index.json", {"_class_name": "QwenImagePipeline"})
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256, "base_shift": 0.5,
            "max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02, "use_dynamic_shifting": True,
        },
    )  # fmt: skip
    parts = {
        "text_encoder": (Qwen25VLEncoder, {
            "model_type": "qwen2_5_vl", "image_token_id": ids["<|image_pad|>"],
            "text_config": {
                "model_type": "qwen2_5_vl_text", "vocab_size": 300, "hidden_size": width,
                "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "rope_theta": 1e6,
                "rope_scaling": {"mrope_section": [width // 8, width // 16, width // 16], "type": "default"},
            } | (text or {}),
            "vision_config": {
                "depth": 2, "hidden_size": width, "intermediate_size": 2 * width, "num_heads": 2,
                "out_hidden_size": width, "fullatt_block_indexes": [1],
            } | (vision or {}),
        }),
        "transformer": (QwenTransformer, {
            "_class_name": "QwenImageTransformer2DModel", "num_layers": 2, "attention_head_dim": width,
            "num_attention_heads": 2, "axes_dims_rope": [width // 8, width * 7 // 16, width * 7 // 16],
            "joint_attention_dim": (text or {}).get("hidden_size", width),
        }),
        "vae": (AutoencoderWan, {
            "_class_name": "AutoencoderKLQwenImage", "base_dim": 4, "dim_mult": [1, 2, 2, 2],
        }),
    }  # fmt: skip
    return write_components(folder, parts)


_SOURCE = Path(__file__).parents[3] / "docs" / "demo.png"
_QWEN = "mflux.models.qwen.variants"

TINY = (
    Tiny(
        write=write_tiny,
        command="generate-qwen",
        base_model="qwen-image",
        pipeline=f"{_QWEN}.txt2img.qwen_image:QwenImage",
        # What the command takes where nothing is said.
        generate={"guidance": 3.5},
        refused=(
            ("vae", {"z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "with 4 latent channels"),
            ("vae", {"dim_mult": 3}, "dim_mult"),
            ("vae", {"dim_mult": None}, "dim_mult"),
            ("vae", {"z_dim": "16"}, "z_dim"),
            ("vae", {"z_dim": [16]}, "z_dim"),
        ),
    ),
    Tiny(
        write=write_tiny,
        command="generate-qwen-edit",
        base_model="qwen-image-edit-2511",
        words=("--image-paths", _SOURCE),
        pipeline=f"{_QWEN}.edit.qwen_image_edit:QwenImageEdit",
        generate={"image_paths": [_SOURCE], "guidance": 2.5},
        patches={f"{_QWEN}.edit.qwen_image_edit._AREA": _AREA},
    ),
)


# ---- training


def _encoded(folder: Path, image, prompt: str, width: int, height: int, source):
    import torch

    pipeline = pipeline_reference(folder, "QwenImagePipeline")
    vae = pipeline.vae
    mean, std = (torch.tensor(values)[:, None, None] for values in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt(prompt, max_sequence_length=1024)
        pixels = pipeline.image_processor.preprocess(image, height=height, width=width)
        latents = (vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
    return pipeline._pack_latents(latents, 1, 16, height // 8, width // 8), {"prompt_embeds": embeds}


def _velocity(transformer, latents, sigma, cond, width: int, height: int, guidance: float):
    import torch

    return transformer(
        hidden_states=latents,
        encoder_hidden_states=cond["prompt_embeds"],
        timestep=torch.tensor([sigma]),
        img_shapes=[[(1, height // 16, width // 16)]],
    ).sample


TRAINING = (
    Training(
        name="training",
        model="qwen-image",
        write=write_qwen,
        pipeline="QwenImagePipeline",
        transformer="QwenImageTransformer2DModel",
        targets=(
            {"module_path": "transformer_blocks.{block}.attn.to_q", "blocks": "all", "rank": 4, "alpha": 8},
            {"module_path": "transformer_blocks.{block}.attn.add_k_proj", "blocks": "all", "rank": 4},
            {"module_path": "transformer_blocks.0.img_mod.1", "rank": 3, "alpha": 1.5},
            {"module_path": "transformer_blocks.0.txt_mlp.net.2", "rank": 2},
            {"module_path": "txt_in", "rank": 2, "alpha": 3},
            {"module_path": "proj_out", "rank": 2},
        ),
        encoded=_encoded,
        velocity=_velocity,
    ),
)

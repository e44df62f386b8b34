"""FLUX.1's variants: what the tests of all families need to know of them."""

from __future__ import annotations

import importlib
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from support.cases import Component, Pipeline, Tiny
from support.images import generated, mask, noise, photo

from families.flux.cases import key_biases, normal, same_sum_in_the_condition, transformer_inputs
from mflux.backend import mx
from mflux.models.common.config import ModelConfig
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.model.controlnet import FluxControlNet
from mflux.models.flux.model.redux import ReduxEmbedder, SiglipVision
from mflux.models.flux.model.transformer import latent_image_ids

PROMPT = "an oil painting of a Café in Zürich, 4k 🐱"
_VARIANTS = "mflux.models.flux.variants"


# ---- whole pictures


def write_model(folder: Path, **settings) -> Path:
    from support.reference import write_flux

    return write_flux(folder, **dict(seed=30, guidance=True, scheduler="dynamic") | settings)


def ours(module: str, key: str, length: int = 64):
    """Draws with our class and the model's configuration."""

    def draw(folder: Path, settings):
        path, _, name = module.partition(":")
        pipeline = getattr(importlib.import_module(f"{_VARIANTS}.{path}"), name)
        config = ModelConfig.from_name(key)
        # The tiny tokenizers' limit, not the model's, decides what a prompt becomes; 512 tokens would only take time.
        config.max_sequence_length = length
        settings = {name: value for name, value in settings.items() if name != "edges"}
        return generated(pipeline(model_path=str(folder), model_config=config), **settings)

    return draw


@cache
def reference(folder: Path, name: str):
    """A pipeline of the reference, made of a FLUX.1 folder's components."""
    import diffusers

    parts = diffusers.FluxPipeline.from_pretrained(folder).components
    parts = {key: part for key, part in parts.items() if part is not None}
    pipeline = getattr(diffusers, name)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def both(pipeline, settings, **inputs):
    """Latents and picture of the reference, drawn once and decoded as it does."""
    import torch

    height, width = settings["height"], settings["width"]
    latents = pipeline(
        prompt=settings["prompt"],
        height=height,
        width=width,
        num_inference_steps=settings["num_inference_steps"],
        guidance_scale=settings["guidance"],
        max_sequence_length=64,
        output_type="latent",
        **{"latents": noise(FluxLatentCreator, settings)} | inputs,
    ).images
    config = pipeline.vae.config
    unpacked = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
    with torch.no_grad():
        decoded = pipeline.vae.decode(unpacked / config.scaling_factor + config.shift_factor).sample
    return latents, np.asarray(pipeline.image_processor.postprocess(decoded, output_type="pil")[0])


def kontext_reference(folder: Path, settings):
    pipeline = reference(folder, "FluxKontextPipeline")
    size = settings["width"], settings["height"]
    # The reference would take the nearest of its sizes of about a megapixel.
    image = pipeline.image_processor.resize(settings["image_path"], settings["height"], settings["width"])
    assert image.size == size
    return both(pipeline, settings, image=image, max_area=size[0] * size[1], _auto_resize=False)


def fill_reference(folder: Path, settings):
    images = {"image": settings["image_path"], "mask_image": settings["masked_image_path"]}
    return both(reference(folder, "FluxFillPipeline"), settings, **images)


def side_by_side(folder: Path, settings):
    """The reference's Fill on a picture that is put together by hand."""
    import PIL.Image

    size = width, height = settings["width"], settings["height"]

    def beside(left, right):
        canvas = PIL.Image.new(left.mode, (2 * width, height))
        for place, half in ((0, left), (width, right)):
            canvas.paste(half.resize(size, PIL.Image.Resampling.LANCZOS), (place, 0))
        return canvas

    left = settings["left_image_path"]
    right = settings.get("right_image_path") or PIL.Image.new("RGB", size, (30, 200, 90))
    white = settings.get("masked_image_path") or PIL.Image.new("L", size, 255)
    images = {"image_path": beside(left, right)}
    images["masked_image_path"] = beside(PIL.Image.new("L", white.size, 0), white)
    return fill_reference(folder, settings | images | {"width": 2 * width})


def depth_reference(folder: Path, settings):
    # Its own draw from the posterior comes from a generator; the posterior is sharp.
    pipeline = reference(folder, "FluxControlPipeline")
    return both(pipeline, settings, control_image=settings["depth_image_path"])


def controlnet_reference(folder: Path, settings):
    import diffusers
    import PIL.Image

    from mflux.models.common.controls.canny import canny

    parts = diffusers.FluxPipeline.from_pretrained(folder).components
    parts = {key: part for key, part in parts.items() if part is not None}
    net = diffusers.FluxControlNetModel.from_pretrained(folder / "transformer_controlnet")
    pipeline = diffusers.FluxControlNetPipeline(**parts, controlnet=net)
    pipeline.set_progress_bar_config(disable=True)
    size = settings["width"], settings["height"]
    image = settings["controlnet_image_path"].resize(size, PIL.Image.Resampling.LANCZOS)
    if settings.get("edges", True):
        image = PIL.Image.fromarray(canny(np.asarray(image))).convert("RGB")
    return both(
        pipeline,
        {key: value for key, value in settings.items() if key != "edges"},
        control_image=image,
        controlnet_conditioning_scale=settings["controlnet_strength"],
    )


def controlled(layers: tuple[int, int], net: tuple[int, int], *, asks: bool = True, **settings):
    """Writes a FLUX.1 of so many double and single blocks with a ControlNet of fewer."""

    def write(folder: Path) -> Path:
        from support.reference import draw, save

        write_model(folder, layers=layers, sharp=True, **settings)
        controlnet = controlnet_model(in_channels=64, num_layers=net[0], num_single_layers=net[1], guidance_embeds=asks)
        save(draw(controlnet, 5), folder / "transformer_controlnet")
        return folder

    return write


# ---- the ControlNet as a component


def same_sum_at_the_entrance(first: str, second: str) -> bool:
    """Latents and control picture are added up, and with them the biases of their layers."""
    return {first, second} == {"x_embedder.bias", "controlnet_x_embedder.bias"}


def controlnet_model(**settings):
    from diffusers import FluxControlNetModel
    from support.reference import TRANSFORMER

    return FluxControlNetModel(**TRANSFORMER | settings)


def controlnet_inputs(model, number: int) -> dict:
    inputs = transformer_inputs(model, number)
    return inputs | {"control": normal(7, *inputs["latents"].shape)}


def run_controlnet(module, inputs):
    residuals = module(
        mx.array(inputs["latents"]),
        control=mx.array(inputs["control"]),
        strength=0.7,
        sigma=mx.array(inputs["sigma"]),
        prompt_embeds=mx.array(inputs["text"]),
        pooled_prompt_embeds=mx.array(inputs["pooled"]),
        image_ids=latent_image_ids(*inputs["grid"]),
        guidance=mx.array(inputs["guidance"]) if "guidance" in inputs else None,
    )
    return [*residuals.double, *residuals.single]


def run_controlnet_reference(model, inputs):
    import torch
    from diffusers import FluxPipeline

    double, single = model(
        hidden_states=torch.tensor(inputs["latents"]),
        controlnet_cond=torch.tensor(inputs["control"]),
        conditioning_scale=0.7,
        encoder_hidden_states=torch.tensor(inputs["text"]),
        pooled_projections=torch.tensor(inputs["pooled"]),
        timestep=torch.tensor(inputs["sigma"]),
        guidance=torch.tensor(inputs["guidance"]) if "guidance" in inputs else None,
        img_ids=FluxPipeline._prepare_latent_image_ids(1, *inputs["grid"], "cpu", torch.float32),
        txt_ids=torch.zeros(inputs["text"].shape[1], 3),
        return_dict=False,
    )
    return [*(double or ()), *(single or ())]


def controlnet_full_size(config):
    from diffusers import FluxControlNetModel

    return FluxControlNetModel.from_config(config)


COMPONENTS = (
    Component(
        name="controlnet",
        module=FluxControlNet,
        reference=controlnet_model,
        settings={
            "as published": dict(num_layers=3, num_single_layers=0, guidance_embeds=True),
            "with single blocks": dict(num_layers=1, num_single_layers=2, num_attention_heads=3),
        },
        inputs=controlnet_inputs,
        ours=run_controlnet,
        theirs=run_controlnet_reference,
        published={
            "InstantX/FLUX.1-dev-Controlnet-Canny": 1_791_605_248,
            "jasperai/Flux.1-dev-Controlnet-Upscaler": 1_791_605_248,
        },
        full_size=controlnet_full_size,
        swap=dict(
            in_channels=16, attention_head_dim=8, num_attention_heads=2, axes_dims_rope=[2, 2, 4],
            joint_attention_dim=16, pooled_projection_dim=16, num_layers=2, num_single_layers=1,
        ),
        neutral=(same_sum_in_the_condition, same_sum_at_the_entrance),
        neutral_pairs=2,
    ),
)  # fmt: skip


# ---- Redux

SIGLIP = dict(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2, image_size=56, patch_size=14
)  # fmt: skip


def siglip(**settings):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**SIGLIP | settings))


def siglip_inputs(model, number: int) -> dict:
    size = model.config.image_size
    return {"pixels": normal(4, (1, 3)[number], 3, size, size)}


def run_siglip_reference(model, inputs):
    import torch

    return [model(torch.tensor(inputs["pixels"])).last_hidden_state]


def siglip_full_size(config):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**config))


def siglip_name(name: str) -> str:
    """transformers 5 takes the files' prefix off on loading."""
    return "vision_model." + name.removeprefix("vision_model.")


def save_siglip(model, folder: Path) -> Path:
    """As it was published, with the prefix that transformers 5 takes off."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file({siglip_name(name): value for name, value in load_file(path).items()}, path)
    return folder


def redux_embedder(**settings):
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    return ReduxImageEncoder(**dict(redux_dim=32, txt_in_features=24) | settings)


def run_redux_embedder_reference(model, inputs):
    import torch

    return [model(torch.tensor(inputs["states"])).image_embeds]


def redux_embedder_full_size(config):
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    return ReduxImageEncoder.from_config(config)


def redux_model(folder: Path) -> Path:
    from support.reference import draw

    write_model(folder)
    save_siglip(draw(siglip(), 5), folder / "image_encoder")
    draw(redux_embedder(), 6).save_pretrained(folder / "image_embedder")
    return folder


def redux_reference(folder: Path, settings):
    """Its prior makes the prompt embeds of one picture; of several it makes a sum, and mflux a row."""
    import diffusers
    import torch
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
    from transformers import SiglipVisionModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    pipeline = reference(folder, "FluxPipeline")
    encoder = SiglipVisionModel.from_pretrained(folder / "image_encoder")
    processor = SiglipImageProcessorPil(
        size={"height": 56, "width": 56}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    parts = {name: pipeline.components[name] for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")}
    embedder = ReduxImageEncoder.from_pretrained(folder / "image_embedder")
    prior = diffusers.FluxPriorReduxPipeline(encoder, processor, embedder, **parts)
    made = [prior(image=image, prompt=settings["prompt"]) for image in settings["redux_image_paths"]]
    strengths = settings.get("redux_image_strengths") or [1.0] * len(made)
    # The text's tokens first, then each picture's.
    pictures = [strength * one.prompt_embeds[:, 512:] for one, strength in zip(made, strengths, strict=True)]
    embeds = torch.cat([made[0].prompt_embeds[:, :512], *pictures], dim=1)
    if len(made) == 1 and strengths == [1.0]:
        assert torch.equal(embeds, made[0].prompt_embeds)
    told = {"prompt_embeds": embeds, "pooled_prompt_embeds": made[0].pooled_prompt_embeds}
    return both(pipeline, settings | {"prompt": None}, **told)


# ---- in context


def in_context_reference(folder: Path, settings):
    """There is no reference pipeline: FLUX.1's own, twice as wide, whose left half is put back after each step."""
    import torch

    pipeline = reference(folder, "FluxPipeline")
    height, width = settings["height"], settings["width"]
    vae = pipeline.vae
    pixels = pipeline.image_processor.preprocess(settings["image_path"], height=height, width=width)
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mode()
    clean = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    shape = 1, 16, height // 8, 2 * width // 8
    start = torch.tensor(np.array(mx.random.normal(shape, key=mx.random.key(settings["seed"]))))

    def hold(pipeline, step, timestep, told):
        sigma = pipeline.scheduler.sigmas[step + 1]
        latents = pipeline._unpack_latents(told["latents"], height, 2 * width, 8)
        latents[..., : width // 8] = (1 - sigma) * clean + sigma * start[..., : width // 8]
        return {"latents": pipeline._pack_latents(latents, *shape)}

    packed = pipeline._pack_latents(start, *shape)
    told = {key: value for key, value in settings.items() if key != "image_path"} | {"width": 2 * width}
    return both(pipeline, told, callback_on_step_end=hold, latents=packed)


COMPONENTS += (
    Component(
        name="image_encoder",
        module=SiglipVision,
        reference=siglip,
        settings={
            "two layers": {},
            "other patches": dict(image_size=40, patch_size=10, hidden_size=24, num_attention_heads=2),
        },
        inputs=siglip_inputs,
        ours=lambda module, inputs: [module(mx.array(inputs["pixels"]))],
        theirs=run_siglip_reference,
        save=save_siglip,
        published={"FLUX.1-Redux-dev/image_encoder": 428_225_600},
        full_size=siglip_full_size,
        published_name=siglip_name,
        ignored=(
            "head.probe", "head.attention.in_proj_weight", "head.attention.in_proj_bias",
            "head.attention.out_proj.weight", "head.attention.out_proj.bias", "head.layernorm.weight",
            "head.layernorm.bias", "head.mlp.fc1.weight", "head.mlp.fc1.bias", "head.mlp.fc2.weight",
            "head.mlp.fc2.bias",
        ),
        swap=dict(hidden_size=16, intermediate_size=16, num_attention_heads=2),
        neutral=(key_biases,),
        neutral_pairs=1,
    ),
    Component(
        name="image_embedder",
        module=ReduxEmbedder,
        reference=redux_embedder,
        settings={"narrower": {}, "wider": dict(redux_dim=12, txt_in_features=20)},
        inputs=lambda model, number: {"states": normal(4, (1, 3)[number], (7, 4)[number], model.config.redux_dim)},
        ours=lambda module, inputs: [module(mx.array(inputs["states"]))],
        theirs=run_redux_embedder_reference,
        published={"FLUX.1-Redux-dev/image_embedder": 64_503_808},
        full_size=redux_embedder_full_size,
    ),
)  # fmt: skip


# ---- concept attention


class Beside:
    """The paper's formula on the reference's transformer: while it draws, a concept goes through its double blocks.

    What the picture is to it comes from hooks on the reference's own attention: the picture's keys and values, and what
    attention gives its tokens. The concept goes through the reference's own block, whose attention is written out here.
    """

    def __init__(self, transformer, embeds, pooled, layers):
        self.transformer, self.embeds, self.pooled, self.layers = transformer, embeds, pooled, layers
        self.looking = False
        self.heat: list[dict[int, Any]] = []
        self.hooks = [
            transformer.time_text_embed.register_forward_pre_hook(self.step),
            *(
                block.register_forward_hook(partial(self.after, number), with_kwargs=True)
                for number, block in enumerate(transformer.transformer_blocks)
            ),
        ]
        for block in transformer.transformer_blocks:
            told = {"keys": block.attn.norm_k, "values": block.attn.to_v}
            self.hooks += [part.register_forward_hook(partial(self.note, name)) for name, part in told.items()]
            self.hooks.append(block.attn.to_out[0].register_forward_pre_hook(partial(self.note, "picture")))
        self.seen: dict[str, Any] = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def note(self, name: str, part, told, out=None) -> None:
        if not self.looking:
            self.seen[name] = told[0] if out is None else out

    def step(self, part, told) -> None:
        if self.looking:
            return
        self.looking = True
        self.temb = part(*told[:-1], self.pooled)
        self.looking = False
        self.concept = self.transformer.context_embedder(self.embeds)
        self.heat.append({})

    def after(self, number: int, block, args, kwargs, out) -> None:
        if self.looking:
            return
        import torch

        self.looking, given = True, block.attn.processor
        block.attn.processor = self.attend
        told = kwargs | {"encoder_hidden_states": self.concept, "temb": self.temb}
        self.concept, _ = block(*args, **told)
        block.attn.processor, self.looking = given, False
        if number in self.layers:
            alike = torch.einsum("tc,lc->tl", self.attended[0], self.seen["picture"][0])
            self.heat[-1][number] = alike.exp() / alike.exp().sum(dim=0, keepdim=True)

    def attend(self, attn, hidden_states, encoder_hidden_states, mask, rotary):
        """Of concept and picture only the concept's rows, queries at position zero."""
        import torch
        from diffusers.models.embeddings import apply_rotary_emb

        def heads(x):
            return x.unflatten(-1, (-1, attn.head_dim))

        q = attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))
        k = attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))
        v = heads(attn.add_v_proj(encoder_hidden_states))
        count = self.seen["keys"].shape[1]
        turned = apply_rotary_emb(self.seen["keys"], tuple(part[-count:] for part in rotary), sequence_dim=1)
        k, v = torch.cat([k, turned], dim=1), torch.cat([v, heads(self.seen["values"])], dim=1)
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(attn.head_dim**0.5).softmax(dim=-1)
        self.attended = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2, 3)
        return torch.zeros_like(hidden_states), attn.to_add_out(self.attended)


def heat_of(seen: Beside, settings) -> tuple[Any, Any]:
    """The mean over the blocks and steps that are asked for, and its picture."""
    import torch

    from mflux.models.flux.variants.concept_attention.attention_data import heat_picture

    steps = settings.get("heatmap_timesteps") or range(len(seen.heat))
    heat = torch.stack([seen.heat[step][layer] for step in steps for layer in seen.layers]).mean(dim=0).numpy()
    return heat, np.asarray(heat_picture(heat, settings["height"], settings["width"]))


def beside(pipeline, settings) -> Beside:
    embeds, pooled, _ = pipeline.encode_prompt(settings["concept"], None, max_sequence_length=64)
    blocks = len(pipeline.transformer.transformer_blocks)
    layers = settings.get("heatmap_layer_indices") or range(max(0, blocks - 4), blocks)
    return Beside(pipeline.transformer, embeds, pooled, layers)


def concept_reference(folder: Path, settings):
    pipeline = reference(folder, "FluxPipeline")
    with beside(pipeline, settings) as seen:
        both(pipeline, settings)
    return heat_of(seen, settings)


def concept_in_picture_reference(folder: Path, settings):
    """The picture with the noise of each step over it, and the transformer's answers unused."""
    import torch

    pipeline = reference(folder, "FluxPipeline")
    height, width, vae = settings["height"], settings["width"], pipeline.vae
    pixels = pipeline.image_processor.preprocess(settings["image_path"], height=height, width=width)
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mode()
        embeds, pooled, text_ids = pipeline.encode_prompt(settings["prompt"], None, max_sequence_length=64)
    clean = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    clean = pipeline._pack_latents(clean, 1, 16, height // 8, width // 8)
    pipeline.scheduler.set_timesteps(
        sigmas=np.linspace(1, 1 / settings["num_inference_steps"], settings["num_inference_steps"]),
        mu=calculate_shift(clean.shape[1]),
    )
    ids = pipeline._prepare_latent_image_ids(1, height // 16, width // 16, "cpu", torch.float32)
    left_out = int(settings["num_inference_steps"] * settings.get("image_strength", 0))
    with beside(pipeline, settings) as seen, torch.no_grad():
        for sigma in pipeline.scheduler.sigmas[left_out:-1]:
            pipeline.transformer(
                hidden_states=(1 - sigma) * clean + sigma * noise(FluxLatentCreator, settings),
                timestep=sigma[None],
                guidance=torch.tensor([settings["guidance"]]),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                txt_ids=text_ids,
                img_ids=ids,
            )
    return heat_of(seen, settings)


def calculate_shift(length: int) -> float:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    return calculate_shift(length, 256, 4096, 0.5, 1.15)


def concept_heat(module: str):
    """The heat and its picture, in place of latents and what is drawn."""
    draw = ours(f"concept_attention.{module}", "dev")

    def heat(folder: Path, settings):
        from mflux.models.flux.variants.concept_attention import attention_data

        with mock.patch.object(attention_data, "heat_picture", wraps=attention_data.heat_picture) as seen:
            draw(folder, settings)
        ((heat, height, width), _) = seen.call_args
        return heat, np.asarray(attention_data.heat_picture(heat, height, width))

    return heat


def deep_model(folder: Path) -> Path:
    return write_model(folder, layers=(6, 1))


def fill_model(folder: Path) -> Path:
    return write_model(folder, channels=384)


def sharp_photo(width: int, height: int):
    """A picture with edges in it."""
    import PIL.Image

    pixels = np.asarray(photo(width, height)).copy()
    pixels[height // 4 : height // 2, width // 5 : width // 2] = (250, 30, 60)
    pixels[height // 2 :, width // 2 :] //= 3
    return PIL.Image.fromarray(pixels)


def _picture(**settings):
    return dict(seed=3, prompt=PROMPT, num_inference_steps=3, height=64, width=96, guidance=3.5) | settings


PIPELINES = (
    Pipeline(
        name="kontext",
        folders={"kontext": write_model},
        pictures={
            "of its size": ("kontext", _picture(image_path=photo(96, 64))),
            "of another size": (
                "kontext",
                _picture(image_path=photo(70, 121), height=80, width=48, num_inference_steps=5, guidance=2.5, seed=4),
            ),
        },
        ours=ours("kontext.flux_kontext:Flux1Kontext", "dev-kontext"),
        theirs=kontext_reference,
    ),
    Pipeline(
        name="fill",
        folders={"fill": fill_model},
        pictures={
            "of its size": (
                "fill",
                _picture(image_path=photo(96, 64), masked_image_path=mask(96, 64), guidance=30.0),
            ),
            "of other sizes": (
                "fill",
                _picture(
                    image_path=photo(70, 121), masked_image_path=mask(33, 90), height=80, width=48, seed=4,
                    num_inference_steps=5,
                ),
            ),
        },
        ours=ours("fill.flux_fill:Flux1Fill", "dev-fill"),
        theirs=fill_reference,
    ),
    Pipeline(
        name="in context",
        folders={"fill": fill_model},
        pictures={
            "editing": ("fill", _picture(left_image_path=photo(50, 64), height=64, width=48)),
            "trying on": (
                "fill",
                _picture(
                    left_image_path=photo(90, 61), right_image_path=photo(70, 44), masked_image_path=mask(70, 44),
                    height=48, width=64, num_inference_steps=4, guidance=30.0,
                ),
            ),
        },
        ours=ours("in_context.flux_in_context_fill:Flux1InContextFill", "dev-fill"),
        theirs=side_by_side,
    ),
    Pipeline(
        name="depth",
        folders={"depth": lambda folder: write_model(folder, channels=128)},
        pictures={
            "of its size": ("depth", _picture(depth_image_path=photo(96, 64), guidance=10.0)),
            "of another size": (
                "depth",
                _picture(depth_image_path=photo(70, 121), height=80, width=48, seed=4, num_inference_steps=5),
            ),
        },
        ours=ours("depth.flux_depth:Flux1Depth", "dev-depth"),
        theirs=depth_reference,
    ),
    Pipeline(
        name="edges",
        folders={
            "dev": controlled((5, 2), (2, 0)),
            "schnell, with single blocks": controlled((2, 5), (1, 2), guidance=False, scheduler="static"),
        },
        pictures={
            "dev": ("dev", _picture(controlnet_image_path=sharp_photo(96, 64), controlnet_strength=0.4)),
            "schnell": (
                "schnell, with single blocks",
                _picture(
                    controlnet_image_path=sharp_photo(70, 121), controlnet_strength=1.0, height=80, width=48,
                    num_inference_steps=4,
                ),
            ),
        },
        ours=ours("controlnet.flux_controlnet:Flux1Controlnet", "dev-controlnet-canny"),
        theirs=controlnet_reference,
    ),
    Pipeline(
        name="redux",
        folders={"redux": redux_model},
        pictures={
            "one picture": ("redux", _picture(redux_image_paths=[photo(90, 61)])),
            "several, and how much of each": (
                "redux",
                _picture(
                    redux_image_paths=[photo(56, 56), photo(30, 70)], redux_image_strengths=[0.4, 1.5], height=48,
                    width=80, num_inference_steps=2,
                ),
            ),
        },
        ours=ours("redux.flux_redux:Flux1Redux", "dev-redux", length=512),
        theirs=redux_reference,
    ),
    Pipeline(
        name="beside a picture",
        folders={"dev": write_model},
        pictures={
            "of its size": ("dev", _picture(image_path=photo(48, 64), height=64, width=48)),
            "of another size": (
                "dev",
                _picture(image_path=photo(70, 121), height=48, width=64, num_inference_steps=5, seed=4),
            ),
        },
        ours=ours("in_context.flux_in_context_dev:Flux1InContextDev", "dev"),
        theirs=in_context_reference,
    ),
    Pipeline(
        name="upscaler",
        folders={"upscaler": controlled((3, 1), (2, 0)), "asks nothing": controlled((3, 1), (2, 0), asks=False)},
        pictures={
            "twice the size": (
                "upscaler",
                _picture(controlnet_image_path=photo(48, 32), controlnet_strength=0.6, edges=False),
            ),
            "without guidance of its own": (
                "asks nothing",
                _picture(
                    controlnet_image_path=photo(24, 40), controlnet_strength=0.9, edges=False, height=80, width=48
                ),
            ),
        },
        ours=ours("controlnet.flux_controlnet:Flux1Controlnet", "dev-controlnet-upscaler"),
        theirs=controlnet_reference,
    ),
    Pipeline(
        name="a concept in what is drawn",
        folders={"deep": deep_model, "shallow": write_model},
        pictures={
            "the last four blocks, all steps": ("deep", _picture(concept="a café")),
            "some of both": (
                "deep",
                _picture(
                    concept="Zürich 🐱", heatmap_layer_indices=[1, 4], heatmap_timesteps=[0, 3], seed=4, height=48,
                    num_inference_steps=5,
                ),
            ),
            "one block": ("shallow", _picture(concept="oil", num_inference_steps=1)),
        },
        ours=concept_heat("flux_concept:Flux1Concept"),
        theirs=concept_reference,
    ),
    Pipeline(
        name="a concept in a picture",
        folders={"deep": deep_model},
        pictures={
            "all steps": ("deep", _picture(concept="a café", image_path=photo(96, 64))),
            "some are left out": (
                "deep",
                _picture(
                    concept="oil", image_path=photo(70, 121), image_strength=0.5, num_inference_steps=4, height=80,
                    width=48, heatmap_layer_indices=[0, 5],
                ),
            ),
        },
        ours=concept_heat("flux_concept_from_image:Flux1ConceptFromImage"),
        theirs=concept_in_picture_reference,
    ),
)  # fmt: skip


# ---- models that need no reference


def tiny(**changes):
    """Writes a tiny FLUX.1 whose transformer differs from text to image's by `changes`."""

    def write(folder: Path, *, wide: bool = False) -> Path:
        from support.tiny import write_checkpoint

        return write_checkpoint(folder, seed=3, guidance=True, wide=wide, changes={"transformer": changes})

    return write


def add_component(
    folder: Path, module: type, name: str, *, seed: int, stem="diffusion_pytorch_model", **config
) -> Path:
    """Write one component more, with random weights."""
    from support.tiny import published, write_json

    write_json(folder / name / "config.json", config)
    tensors = published(module(module.config_class.from_dict(config)), seed=seed)
    mx.save_safetensors(str(folder / name / f"{stem}.safetensors"), tensors, metadata={"format": "pt"})
    return folder


def tiny_controlled(folder: Path, *, wide: bool = False) -> Path:
    import json

    settings = json.loads((tiny()(folder, wide=wide) / "transformer" / "config.json").read_text())
    settings |= {"_class_name": "FluxControlNetModel", "num_layers": 1, "num_single_layers": 0}
    return add_component(folder, FluxControlNet, "transformer_controlnet", seed=9, **settings)


def tiny_redux(folder: Path, *, wide: bool = False) -> Path:
    import json

    width = json.loads((tiny()(folder, wide=wide) / "transformer" / "config.json").read_text())["joint_attention_dim"]
    add_component(folder, SiglipVision, "image_encoder", seed=7, stem="model", **SIGLIP)
    embedder = {"_class_name": "ReduxImageEncoder", "redux_dim": SIGLIP["hidden_size"], "txt_in_features": width}
    return add_component(folder, ReduxEmbedder, "image_embedder", seed=8, **embedder)


def write_pictures(folder: Path) -> None:
    photo(64, 48).save(folder / "photo.png")
    photo(40, 56).save(folder / "other.png")
    mask(64, 48).save(folder / "mask.png")


Variant = partial(Tiny, pictures=write_pictures)
TINY = (
    Variant(
        write=tiny(),
        command="generate-kontext",
        base_model="dev-kontext",
        words=("--image-path", "photo.png"),
        pipeline=f"{_VARIANTS}.kontext.flux_kontext:Flux1Kontext",
        generate={"image_path": "photo.png", "guidance": 2.5},
    ),
    Variant(
        write=tiny(in_channels=384, out_channels=64),
        command="generate-fill",
        base_model="dev-fill",
        words=("--image-path", "photo.png", "--masked-image-path", "mask.png"),
        pipeline=f"{_VARIANTS}.fill.flux_fill:Flux1Fill",
        generate={"image_path": "photo.png", "masked_image_path": "mask.png", "guidance": 30.0},
    ),
    Variant(
        write=tiny(in_channels=384, out_channels=64),
        command="generate-in-context-catvton",
        right_half=True,
        base_model="dev-fill-catvton",
        words=("--garment-image", "other.png", "--person-image", "photo.png", "--person-mask", "mask.png"),
        pipeline=f"{_VARIANTS}.in_context.flux_in_context_fill:Flux1InContextFill",
        generate={
            "left_image_path": "other.png",
            "right_image_path": "photo.png",
            "masked_image_path": "mask.png",
            "guidance": 30.0,
        },
    ),
    Variant(
        write=tiny(in_channels=128, out_channels=64),
        command="generate-depth",
        base_model="dev-depth",
        words=("--depth-image-path", "photo.png"),
        pipeline=f"{_VARIANTS}.depth.flux_depth:Flux1Depth",
        generate={"depth_image_path": "photo.png", "guidance": 10.0},
    ),
    Variant(
        write=tiny_controlled,
        command="generate-controlnet",
        base_model="dev-controlnet-canny",
        words=("--controlnet-image-path", "photo.png"),
        pipeline=f"{_VARIANTS}.controlnet.flux_controlnet:Flux1Controlnet",
        generate={"controlnet_image_path": "photo.png", "controlnet_strength": 0.4, "guidance": 3.5},
    ),
    Variant(
        write=tiny_controlled,
        command="upscale-controlnet",
        base_model="dev-controlnet-upscaler",
        words=("--controlnet-image-path", "photo.png"),
        pipeline=f"{_VARIANTS}.controlnet.flux_controlnet:Flux1Controlnet",
        generate={"controlnet_image_path": "photo.png", "controlnet_strength": 0.4, "guidance": 4.0},
    ),
    Variant(
        write=tiny_redux,
        command="generate-redux",
        base_model="dev-redux",
        words=("--redux-image-paths", "photo.png", "other.png", "--redux-image-strengths", "0.5"),
        pipeline=f"{_VARIANTS}.redux.flux_redux:Flux1Redux",
        generate={
            "redux_image_paths": ["photo.png", "other.png"],
            "redux_image_strengths": [0.5],
            "guidance": 3.5,
        },
    ),
    Variant(
        write=tiny(),
        command="generate-in-context",
        right_half=True,
        base_model="dev",
        words=("--reference-image", "photo.png"),
        pipeline=f"{_VARIANTS}.in_context.flux_in_context_dev:Flux1InContextDev",
        generate={"image_path": "photo.png", "guidance": 3.5},
    ),
    Variant(
        write=tiny(num_layers=3),
        command="concept",
        base_model="dev",
        words=("--concept", "circle"),
        pipeline=f"{_VARIANTS}.concept_attention.flux_concept:Flux1Concept",
        generate={"concept": "circle", "guidance": 3.5},
    ),
)

"""FIBO: what the tests of all families need to know of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from support.cases import Component, Pipeline, Tiny, Training
from support.images import generated, mask, noise, photo, pipeline_reference
from support.tokenizers import write_json, write_whole_tokenizer

from families.flux.cases import normal, token_ids
from families.qwen.cases import run_vae, run_vae_reference, same_sum_in_a_resnet
from mflux.backend import mx, tree_flatten
from mflux.models.common.config import ModelConfig
from mflux.models.common.networks.mmdit import latent_image_ids
from mflux.models.common.networks.text_encoders.smollm3 import SmolLM3TextEncoder
from mflux.models.fibo.latent_creator.fibo_latent_creator import FiboLatentCreator
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
        temperal_downsample=[False, True], is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=8,
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
        swap=dict(dim_mult=[2, 1], temperal_downsample=[True], base_dim=6, decoder_base_dim=6),
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


# ---- whole pictures

PROMPT = json.dumps({"short_description": "a Café in Zürich, at night", "objects": []}, ensure_ascii=False)
EDIT_PROMPT = json.dumps({"short_description": "a red wall", "edit_instruction": "Paint the wall red."})


def write_tokenizer(folder: Path) -> None:
    kinds = {"bos_token": "<|begin|>", "pad_token": "<|pad|>"}
    write_whole_tokenizer(
        folder, [PROMPT, EDIT_PROMPT], size=300, special=list(kinds.values()), start="<|begin|>",
        tokenizer_class="PreTrainedTokenizerFast", **kinds,
    )  # fmt: skip


def write_fibo(folder: Path, *, layers: int, blocks: tuple[int, int], edit: bool = False, **scheduler) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from support.reference import draw

    write_tokenizer(folder / "tokenizer")
    # The reference's empty prompt is the id 128000, whatever the tokenizer.
    text = smollm3_reference(vocab_size=128256, hidden_size=32, num_hidden_layers=layers, bos_token_id=128000)
    draw(text, 1).save_pretrained(folder / "text_encoder")
    transformer = transformer_reference(
        in_channels=48, num_layers=blocks[0], num_single_layers=blocks[1], text_encoder_dim=32
    )
    draw(transformer, 2).save_pretrained(folder / "transformer")
    vae = vae_reference(
        z_dim=48, dim_mult=[1, 2, 2, 2], temperal_downsample=[False, True, True], scale_factor_spatial=16
    )
    draw(vae, 3, {"decoder.conv_out.weight": 0.2}).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **scheduler).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "BriaFiboEditPipeline" if edit else "BriaFiboPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "SmolLM3ForCausalLM"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "BriaFiboTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def draw_fibo(folder: Path, settings):
    from mflux.models.fibo.variants.txt2img.fibo import FIBO

    settings = dict(settings)
    loras = [str(write_lora(folder))] if settings.pop("lora", False) else None
    pipeline = FIBO(
        model_path=str(folder), model_config=ModelConfig.fibo(), lora_paths=loras, lora_scales=loras and [0.7]
    )
    return generated(pipeline, **settings)


def write_lora(folder: Path) -> Path:
    """As diffusers saves one, for a layer of each kind."""
    layers = (
        "transformer_blocks.0.attn.add_k_proj", "transformer_blocks.1.ff.net.0.proj",
        "transformer_blocks.1.norm1.linear", "single_transformer_blocks.2.proj_out", "caption_projection.3.linear",
        "context_embedder", "x_embedder", "time_embed.timestep_embedder.linear_2", "norm_out.linear",
    )  # fmt: skip
    module = FiboTransformer(
        FiboTransformer.config_class.from_dict(json.loads((folder / "transformer" / "config.json").read_text()))
    )
    shapes = dict(tree_flatten(module.parameters()))
    tensors = {}
    for number, layer in enumerate(layers):
        rows, columns = shapes[f"{layer}.weight"].shape
        tensors[f"transformer.{layer}.lora_A.weight"] = mx.array(normal(number, 3, columns)) / columns**0.5
        tensors[f"transformer.{layer}.lora_B.weight"] = mx.array(normal(50 + number, rows, 3))
    path = folder / "lora.safetensors"
    mx.save_safetensors(str(path), tensors)
    return path


def draw_edit(folder: Path, settings):
    from mflux.models.fibo.variants.edit import FIBOEdit

    return generated(FIBOEdit(model_path=str(folder), model_config=ModelConfig.fibo_edit()), **settings)


def draw_fibo_reference(folder: Path, settings):
    pipeline = pipeline_reference(folder, "BriaFiboPipeline")
    if settings.get("lora"):
        pipeline.load_lora_weights(str(write_lora(folder)), adapter_name="style")
        pipeline.set_adapters("style", 0.7)
    try:
        return draw_with_reference(pipeline, settings)
    finally:
        if settings.get("lora"):
            pipeline.unload_lora_weights()


def draw_with_reference(pipeline, settings):
    import torch

    latents = noise(FiboLatentCreator, settings)
    steps, height, width = settings["num_inference_steps"], settings["height"], settings["width"]
    if "image_path" in settings:
        return from_picture_reference(pipeline, settings, latents)
    common = dict(
        prompt=settings["prompt"],
        negative_prompt=settings.get("negative_prompt"),
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=settings["guidance"],
    )
    result = pipeline(**common, latents=latents, output_type="latent").images
    with torch.no_grad():
        picture = pipeline(**common, latents=latents, output_type="pil").images[0]
    return result, np.asarray(picture)


def from_picture_reference(pipeline, settings, latents):
    """The reference has no image to image: its own parts, begun at a later step."""
    import torch
    from diffusers.pipelines.bria_fibo.pipeline_bria_fibo import calculate_shift

    vae, scheduler, steps = pipeline.vae, pipeline.scheduler, settings["num_inference_steps"]
    height, width = settings["height"], settings["width"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (vae.config.latents_mean, vae.config.latents_std))
    pixels = pipeline.image_processor.preprocess(settings["image_path"], height=height, width=width)
    with torch.no_grad():
        encoded = (vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
        picture = encoded.flatten(2).transpose(1, 2)
        mu = calculate_shift(latents.shape[1], 256, 4096, 0.5, 1.15)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
        begin = max(1, int(steps * settings["image_strength"]))
        sigmas = scheduler.sigmas
        latents = (1 - sigmas[begin]) * picture + sigmas[begin] * latents
        embeds, _, text_ids, _, _, layers, _ = pipeline.encode_prompt(settings["prompt"], guidance_scale=1)
        blocks = pipeline.transformer.config.num_layers + pipeline.transformer.config.num_single_layers
        for step in range(begin, steps):
            velocity = pipeline.transformer(
                hidden_states=latents,
                encoder_hidden_states=embeds,
                text_encoder_layers=layers[-blocks:],
                timestep=1000 * sigmas[step][None],
                img_ids=pipeline._prepare_latent_image_ids(1, height // 16, width // 16, "cpu", torch.float32),
                txt_ids=text_ids[0],
            ).sample
            latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
        unpacked = latents.transpose(1, 2).unflatten(2, (height // 16, width // 16))
        decoded = vae.decode((unpacked * std + mean)[:, :, None]).sample[:, :, 0]
    return latents, np.asarray(pipeline.image_processor.postprocess(decoded, output_type="pil")[0])


def draw_edit_reference(folder: Path, settings):
    pipeline = pipeline_reference(folder, "BriaFiboEditPipeline")
    common = dict(
        prompt=settings["prompt"],
        negative_prompt=settings.get("negative_prompt"),
        mask=settings.get("mask_path"),
        height=settings["height"],
        width=settings["width"],
        num_inference_steps=settings["num_inference_steps"],
        guidance_scale=settings["guidance"],
        latents=noise(FiboLatentCreator, settings),
    )
    # A mask is pasted into the list of pictures that is given.
    result = pipeline(**common, image=settings["image_path"].copy(), output_type="latent").images
    picture = pipeline(**common, image=settings["image_path"].copy(), output_type="pil").images[0]
    return result, np.asarray(picture)


def _picture(**settings):
    return dict(seed=3, prompt=PROMPT, num_inference_steps=3, height=64, width=96, guidance=5.0) | settings


def _edit(**settings):
    return _picture(**dict(prompt=EDIT_PROMPT, image_path=photo(96, 64)) | settings)


PIPELINES = (
    Pipeline(
        name="pictures",
        folders={
            "fewer states than blocks": lambda folder: write_fibo(folder, layers=4, blocks=(3, 5)),
            "more states than blocks, to a terminal": lambda folder: write_fibo(
                folder, layers=6, blocks=(1, 3), shift_terminal=0.02
            ),
        },
        pictures={
            "guided away from nothing": ("fewer states than blocks", _picture()),
            "guided away from words": (
                "fewer states than blocks",
                _picture(negative_prompt="blurry, ugly " * 12, num_inference_steps=5, height=80, width=32),
            ),
            "with a LoRA": ("fewer states than blocks", _picture(lora=True)),
            "not guided": ("fewer states than blocks", _picture(guidance=1.0, num_inference_steps=1)),
            "to a terminal": ("more states than blocks, to a terminal", _picture(seed=9, num_inference_steps=7)),
            "from a picture": (
                "more states than blocks, to a terminal",
                _picture(guidance=1.0, image_path=photo(64, 64), image_strength=0.5, num_inference_steps=5),
            ),
        },
        ours=draw_fibo,
        theirs=draw_fibo_reference,
    ),
    Pipeline(
        name="edits",
        folders={"edit": lambda folder: write_fibo(folder, layers=4, blocks=(2, 4), edit=True)},
        pictures={
            "guided": ("edit", _edit()),
            "masked, with words to stay away from": (
                "edit",
                _edit(mask_path=mask(96, 64), negative_prompt="a blue wall", guidance=2.5, num_inference_steps=4),
            ),
            "another size than the picture's, not guided": (
                "edit",
                _edit(image_path=photo(70, 121), height=48, width=80, guidance=1.0),
            ),
        },
        ours=draw_edit,
        theirs=draw_edit_reference,
    ),
)


# ---- a model that needs no reference


def write_tiny(folder: Path, *, wide: bool = False, vocabulary: tuple[int, int] = (320, 300)) -> Path:
    """A whole model of random weights, in the published layout; `vocabulary` is how many tokens there are and which one
    stands for an empty prompt."""
    from support.tiny import write_components

    width = 64 if wide else 32
    write_tokenizer(folder / "tokenizer")
    write_json(folder / "model_index.json", {"_class_name": "BriaFiboPipeline"})
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
    )
    parts = {
        "text_encoder": (SmolLM3TextEncoder, {
            "model_type": "smollm3", "vocab_size": vocabulary[0], "hidden_size": width, "intermediate_size": 2 * width,
            "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": vocabulary[1],
            # As published: no shape of a folder that mflux 0.24 saved tells it.
            "head_dim": 128,
        }),
        "transformer": (FiboTransformer, {
            "_class_name": "BriaFiboTransformer2DModel", "num_layers": 1, "num_single_layers": 2,
            "attention_head_dim": width, "num_attention_heads": 2,
            "axes_dims_rope": [width // 8, width * 7 // 16, width * 7 // 16],
            "text_encoder_dim": width, "joint_attention_dim": 2 * width,
        }),
        "vae": (FiboAutoencoder, {
            "_class_name": "AutoencoderKLWan", "base_dim": 4, "decoder_base_dim": 8, "dim_mult": [1, 2, 2, 2],
            "num_res_blocks": 1,
        }),
    }  # fmt: skip
    return write_components(folder, parts)


TINY = (
    Tiny(
        write=write_tiny,
        command="generate-fibo",
        base_model="fibo",
        pipeline="mflux.models.fibo.variants.txt2img.fibo:FIBO",
        # What the command takes where nothing is said.
        generate={"guidance": 5.0},
        prompt=PROMPT,
        refused=(
            ("transformer", {"in_channels": 16}, "16"),
            ("text_encoder", {"hidden_size": 64}, "different models"),
            ("vae", {"dim_mult": [1, 2, 2], "temperal_downsample": [False, True]}, "8 pixels"),
            ("transformer", {"_class_name": "FluxTransformer2DModel"}, "mflux-generate --base-model schnell draws"),
            ("transformer", {"guidance_embeds": True}, "guidance_embeds"),
            ("text_encoder", {"bos_token_id": 320}, "none of 320 tokens"),
        ),
    ),
)


# ---- training


def _encoded(folder: Path, image, prompt: str, width: int, height: int, source):
    import torch

    pipeline = pipeline_reference(folder, "BriaFiboPipeline")
    vae = pipeline.vae
    mean, std = (torch.tensor(values)[:, None, None] for values in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        layers = pipeline.encode_prompt(prompt, guidance_scale=1)[5]
        # Its processor would round to multiples of 32.
        pixels = torch.tensor(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        latents = (vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
    return latents.flatten(2).transpose(1, 2), {"text_layers": torch.stack(list(layers), dim=1)}


def _velocity(transformer, latents, sigma, cond, width: int, height: int, guidance: float):
    import torch
    from diffusers import FluxPipeline

    layers = list(cond["text_layers"].unbind(1))
    blocks = transformer.config.num_layers + transformer.config.num_single_layers
    chosen = layers[-blocks:] if len(layers) >= blocks else layers + [layers[-1]] * (blocks - len(layers))
    return transformer(
        hidden_states=latents,
        encoder_hidden_states=torch.cat([layers[-1], layers[-2]], dim=-1),
        text_encoder_layers=chosen,
        timestep=1000 * torch.tensor([sigma]),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 16, width // 16, "cpu", torch.float32),
        txt_ids=torch.zeros(layers[0].shape[1], 3),
    ).sample


TRAINING = (
    Training(
        name="training",
        model="fibo",
        write=lambda folder: write_fibo(folder, layers=4, blocks=(2, 2)),
        pipeline="BriaFiboPipeline",
        transformer="BriaFiboTransformer2DModel",
        captions=(PROMPT, EDIT_PROMPT, PROMPT),
        targets=(
            {"module_path": "transformer_blocks.{block}.attn.to_q", "blocks": "all", "rank": 4, "alpha": 8},
            {"module_path": "transformer_blocks.0.norm1_context.linear", "rank": 3, "alpha": 1.5},
            {"module_path": "single_transformer_blocks.{block}.proj_mlp", "blocks": {"indices": [0]}, "rank": 4},
            {"module_path": "caption_projection.{block}.linear", "blocks": {"indices": [1]}, "rank": 2},
            {"module_path": "context_embedder", "rank": 2, "alpha": 3},
            {"module_path": "proj_out", "rank": 2},
        ),
        encoded=_encoded,
        velocity=_velocity,
    ),
)

"""ERNIE-Image: what the tests of all families need to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from support.cases import Component, Pipeline, Settings, Tiny, Training
from support.images import generated, noise, photo, pipeline_reference
from support.tokenizers import CORPUS, write_json, write_whole_tokenizer

from families.flux.cases import key_biases, normal, same_sum_in_a_resnet, token_ids
from families.flux2.cases import vae_full_size, vae_inputs, vae_reference
from mflux.backend import mx
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.ernie_image.latent_creator import ErnieLatentCreator
from mflux.models.ernie_image.model.autoencoder import ErnieAutoencoder
from mflux.models.ernie_image.model.text_encoder import ErnieTextEncoder, WholeTextEncoder
from mflux.models.ernie_image.model.transformer import ErnieTransformer

# ---- text encoder

YARN = dict(
    rope_type="yarn", rope_theta=1e6, factor=16.0, original_max_position_embeddings=256, beta_fast=32.0, beta_slow=1.0,
    mscale=1.0, mscale_all_dim=1.0,
)  # fmt: skip
MISTRAL = dict(
    vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, rope_parameters=YARN, sliding_window=None,
)  # fmt: skip
VISION = dict(
    model_type="pixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    image_size=28, patch_size=14, head_dim=8,
)  # fmt: skip
# What the published file holds that no prompt goes through.
_UNUSED = (
    "language_model.model.norm.weight", "attention.k_proj.weight", "attention.o_proj.weight",
    "attention.q_proj.weight", "attention.v_proj.weight", "attention_norm.weight", "ffn_norm.weight",
    "feed_forward.down_proj.weight", "feed_forward.gate_proj.weight", "feed_forward.up_proj.weight", "ln_pre.weight",
    "patch_conv.weight", "linear_1.weight", "linear_2.weight", "projector.norm.weight", "merging_layer.weight",
    *(
        f".layers.25.{leaf}.weight"
        for leaf in (
            "input_layernorm", "post_attention_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        )
    ),
)  # fmt: skip


def mistral_reference(**settings):
    from transformers import Mistral3Config, Mistral3Model

    return Mistral3Model(
        Mistral3Config(text_config=dict(model_type="mistral") | MISTRAL | settings, vision_config=VISION)
    )


def mistral_inputs(model, number: int) -> dict:
    return {"ids": token_ids(*((1, 9), (3, 70))[number], model.config.text_config.vocab_size)}


def run_mistral(module, inputs):
    return module(mx.array(inputs["ids"]))


def run_mistral_reference(model, inputs):
    import torch

    return [model(input_ids=torch.tensor(inputs["ids"]), output_hidden_states=True).hidden_states[-2]]


def mistral_full_size(config):
    from transformers import Mistral3Config, Mistral3Model

    return Mistral3Model(Mistral3Config(**config))


def mistral_name(name: str) -> str:
    """transformers 5 takes a part of the files' names out on loading."""
    return name.replace("language_model.", "language_model.model.", 1)


# ---- transformer

TRANSFORMER = dict(
    hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=48, in_channels=12, out_channels=12,
    text_in_dim=24, rope_axes_dim=[4, 6, 6],
)  # fmt: skip


def transformer_reference(**settings):
    from diffusers import ErnieImageTransformer2DModel

    return ErnieImageTransformer2DModel(**TRANSFORMER | settings)


def transformer_inputs(model, number: int) -> dict:
    batch, height, width, length = ((1, 3, 5, 7), (3, 6, 2, 11))[number]
    return {
        "latents": normal(1, batch, model.config.in_channels, height, width),
        "text": normal(2, batch, length, model.config.text_in_dim),
        # One noise level for each sample, so that none can stand for all.
        "sigma": np.linspace(0.9, 0.3, batch, dtype=np.float32),
    }


def run_transformer(module, inputs):
    latents, text, sigma = (mx.array(inputs[name]) for name in ("latents", "text", "sigma"))
    yield module(latents, sigma=sigma, prompt_embeds=text)
    # Called as mflux 0.24 did it, with prompts of different lengths.
    lengths = mx.array([text.shape[1] - row for row in range(text.shape[0])])
    yield module(hidden_states=latents, timestep=1000 * sigma, text_bth=text, text_lens=lengths)


def run_transformer_reference(model, inputs):
    import torch

    latents, text, sigma = (torch.tensor(inputs[name]) for name in ("latents", "text", "sigma"))
    batch, length = text.shape[:2]
    for lengths in (torch.full((batch,), length), length - torch.arange(batch)):
        yield model(latents, 1000 * sigma, text, lengths, return_dict=False)[0]


def transformer_full_size(config):
    from diffusers import ErnieImageTransformer2DModel

    return ErnieImageTransformer2DModel.from_config(config)


# ---- autoencoder


def narrow_vae_reference(**settings):
    """Variances like those of latents that hardly vary, where an epsilon shows."""
    import torch

    model = vae_reference(**settings)
    with torch.no_grad():
        model.bn.running_var.copy_(torch.linspace(1e-4, 1e-3, model.bn.running_var.numel()))
    return model


def run_vae(module, inputs):
    yield module.encode(mx.array(inputs["image"]))
    yield module.decode(mx.array(inputs["latents"]))


def run_vae_reference(model, inputs):
    """The lines of diffusers' pipeline that decode, and their opposite."""
    import torch
    from diffusers import ErnieImagePipeline

    mean = model.bn.running_mean.view(1, -1, 1, 1)
    deviation = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + 1e-5)
    clean = model.encode(torch.tensor(inputs["image"])).latent_dist.mode()
    latents = torch.tensor(inputs["latents"]) * deviation + mean
    return [
        (ErnieImagePipeline._patchify_latents(clean) - mean) / deviation,
        model.decode(ErnieImagePipeline._unpatchify_latents(latents)).sample,
    ]


COMPONENTS = (
    Component(
        name="text_encoder",
        module=ErnieTextEncoder,
        reference=mistral_reference,
        settings={
            "as published": {},
            "plain positions, more layers": dict(
                rope_parameters=dict(rope_type="default", rope_theta=500.0), num_hidden_layers=6, hidden_size=40
            ),
        },
        inputs=mistral_inputs,
        ours=run_mistral,
        theirs=run_mistral_reference,
        published={"ERNIE-Image/text_encoder": 3_849_090_048},
        full_size=mistral_full_size,
        published_name=mistral_name,
        ignored=_UNUSED,
        swap=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, head_dim=8),
    ),
    Component(
        name="transformer",
        module=ErnieTransformer,
        reference=transformer_reference,
        settings={
            "as published": {},
            "text as wide as the model, three heads": dict(
                hidden_size=48, num_attention_heads=3, num_layers=1, text_in_dim=48, eps=1e-3, rope_theta=20
            ),
            "three layers, other axes": dict(rope_axes_dim=[8, 2, 6], num_layers=3, in_channels=5, out_channels=5),
        },
        inputs=transformer_inputs,
        ours=run_transformer,
        theirs=run_transformer_reference,
        # An attention as sharp as a trained one's, where positions show.
        gains={"norm_q.weight": 2.0, "norm_k.weight": 2.0},
        published={"ERNIE-Image/transformer": 8_033_490_048},
        full_size=transformer_full_size,
        swap=dict(
            hidden_size=16, ffn_hidden_size=16, in_channels=16, out_channels=16, text_in_dim=16, rope_axes_dim=[4, 2, 2]
        ),
    ),
    Component(
        name="vae",
        module=ErnieAutoencoder,
        reference=narrow_vae_reference,
        settings={
            "as published": dict(block_out_channels=[8, 8, 16], layers_per_block=2),
            "another epsilon in its configuration": dict(batch_norm_eps=1e-2, latent_channels=3),
        },
        inputs=vae_inputs,
        ours=run_vae,
        theirs=run_vae_reference,
        gains={"decoder.conv_out.weight": 0.3},
        published={"ERNIE-Image/vae": 84_046_115},
        full_size=vae_full_size,
        buffers=("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"),
        ignored=("bn.num_batches_tracked",),
        neutral=(key_biases, same_sum_in_a_resnet),
    ),
)


# ---- whole images

SCHEDULER = dict(num_train_timesteps=1000, shift=4.0, use_dynamic_shifting=False)
PROMPT = "a large red circle on a Café's wall 猫 🐱"
_SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def write_tokenizer(folder: Path) -> int:
    """Returns how many tokens there are."""
    tokenizer = write_whole_tokenizer(
        folder, CORPUS, size=340, special=list(_SPECIAL.values()), start="<s>",
        tokenizer_class="PreTrainedTokenizerFast", model_max_length=2048, pad_token="</s>", **_SPECIAL,
    )  # fmt: skip
    return tokenizer.get_vocab_size()


def write_ernie(folder: Path, *, heads: int = 2, layers: int = 2) -> Path:
    """A tiny model as it is published, by the reference classes."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from support.reference import draw

    vocabulary = write_tokenizer(folder / "tokenizer")
    draw(mistral_reference(vocab_size=vocabulary), 1).save_pretrained(folder / "text_encoder")
    transformer = transformer_reference(
        in_channels=128, out_channels=128, hidden_size=16 * heads, num_attention_heads=heads, num_layers=layers
    )
    draw(transformer, 2).save_pretrained(folder / "transformer")
    vae = narrow_vae_reference(block_out_channels=[8, 8, 16, 16], latent_channels=32)
    # Statistics so small leave little of the latents.
    draw(vae, 3, {"post_quant_conv.weight": 40, "decoder.conv_out.weight": 0.3}).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    content = {
        "_class_name": "ErnieImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Mistral3Model"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "ErnieImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    write_json(folder / "model_index.json", content)
    return folder


def draw_ours(folder: Path, settings):
    from mflux.models.ernie_image import ErnieImage

    return generated(ErnieImage(model_path=str(folder), model_config=ModelConfig.ernie_image()), **settings)


def draw_theirs(folder: Path, settings):
    import PIL.Image
    import torch

    pipeline = pipeline_reference(folder, "ErnieImagePipeline")
    scheduler, plain = pipeline.scheduler, type(pipeline.scheduler).set_timesteps
    height, width, steps = settings["height"], settings["width"], settings["num_inference_steps"]
    latents, first = noise(ErnieLatentCreator, settings), 0
    if source := settings.get("image_path"):
        # The reference has no image to image: the same loop, begun later.
        first = max(1, int(steps * settings["image_strength"]))
        picture = source.resize((width, height), PIL.Image.Resampling.LANCZOS)
        pixels = pipeline.image_processor.preprocess(picture).numpy()
        inputs = {"image": pixels, "latents": latents.numpy()}
        with torch.no_grad():
            clean = run_vae_reference(pipeline.vae, inputs)[0]
        plain(scheduler, sigmas=np.linspace(1, 0, steps + 1)[:-1])
        sigma = scheduler.sigmas[first]
        latents = (1 - sigma) * clean + sigma * latents

    def set_timesteps(sigmas, **given):
        plain(scheduler, sigmas=sigmas.numpy(), **given)
        scheduler.timesteps = scheduler.timesteps[first:]
        scheduler.set_begin_index(first)

    scheduler.set_timesteps = set_timesteps
    seen = {}

    def after_step(_pipeline, step, timestep, values):
        seen.update(values)
        return values

    image = pipeline(
        prompt=settings["prompt"],
        negative_prompt=settings.get("negative_prompt", ""),
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=settings.get("guidance", 1.0),
        latents=latents,
        callback_on_step_end=after_step,
    ).images[0]
    return seen["latents"].numpy(), np.asarray(image)


def _picture(**settings):
    return dict(seed=3, prompt=PROMPT, num_inference_steps=3, height=48, width=80) | settings


PIPELINES = (
    Pipeline(
        name="images",
        folders={
            "two heads": write_ernie,
            "three heads": lambda folder: write_ernie(folder, heads=3, layers=1),
        },
        pictures={
            "not guided": ("two heads", _picture()),
            "guided, with nothing to stay away from": ("two heads", _picture(guidance=4.0, num_inference_steps=5)),
            "guided": (
                "three heads",
                _picture(guidance=2.5, negative_prompt="a blue square, en été 広場", height=96, width=32, seed=2**63),
            ),
            "guided away from blanks": (
                "two heads",
                _picture(guidance=3.0, negative_prompt="  ", num_inference_steps=2),
            ),
            "an empty prompt": ("two heads", _picture(prompt="", num_inference_steps=1)),
            "a long prompt, cut": ("three heads", _picture(prompt="a blue square " * 900, num_inference_steps=2)),
            "from an image": (
                "two heads",
                _picture(image_path=photo(100, 70), image_strength=0.4, num_inference_steps=5),
            ),
            "from an image, guided": (
                "three heads",
                _picture(image_path=photo(64, 64), image_strength=0.75, num_inference_steps=6, guidance=2.0, height=64),
            ),
        },
        ours=draw_ours,
        theirs=draw_theirs,
    ),
)


# ---- a model that needs no reference


def write_tiny(folder: Path, *, wide: bool = False, changes: Mapping[str, Settings] | None = None) -> Path:
    """A whole model of random weights, in the published layout; `changes` are to configurations, by folder."""
    from support.tiny import published, write_components

    width = 64 if wide else 32
    vocabulary = write_tokenizer(folder / "tokenizer")
    write_json(folder / "model_index.json", {"_class_name": "ErnieImagePipeline"})
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler"} | SCHEDULER
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    parts = {
        "text_encoder": (WholeTextEncoder, {
            "architectures": ["Mistral3Model"], "model_type": "mistral3",
            "text_config": {
                "model_type": "mistral", "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width,
                # As published: no shape of a folder that mflux 0.24 saved tells it.
                "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128,
            },
        }),
        "transformer": (ErnieTransformer, {
            "_class_name": "ErnieImageTransformer2DModel", "hidden_size": width, "num_attention_heads": 2,
            "num_layers": 2, "ffn_hidden_size": 2 * width, "text_in_dim": width,
            "rope_axes_dim": [width // 8, width * 3 // 16, width * 3 // 16],
        }),
        "vae": (ErnieAutoencoder, {
            "_class_name": "AutoencoderKLFlux2", "block_out_channels": [8, 8, 16, width], "norm_num_groups": 4,
            "layers_per_block": 1, "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        }),
    }  # fmt: skip

    def weights(module, *, seed: int) -> dict[str, mx.array]:
        tensors = published(module, seed=seed)
        if isinstance(module, ErnieAutoencoder):
            tensors["bn.running_var"] = mx.abs(tensors["bn.running_var"]) + 0.5
            tensors["bn.num_batches_tracked"] = mx.array(7)
        return tensors

    return write_components(folder, parts, changes=changes, draw=weights)


TINY = (
    Tiny(
        write=write_tiny,
        command="generate-ernie-image",
        base_model="ernie-image",
        pipeline="mflux.models.ernie_image.variants.txt2img.ernie_image:ErnieImage",
        # What the command takes where nothing is said.
        generate={"guidance": 4.0},
        refused=(
            ("transformer", {"_class_name": "FluxTransformer2DModel"}, "not ERNIE-Image's transformer"),
            ("transformer", {"in_channels": 64, "out_channels": 64}, "a transformer that takes 64;"),
            ("transformer", {"text_in_dim": 48}, "different models"),
            ("transformer", {"qk_layernorm": False}, "qk_layernorm"),
            ("transformer", {"patch_size": 2}, "a patch_size of 2 is not built"),
            ("transformer", {"rope_axes_dim": [8, 8]}, "rope_axes_dim"),
            ("transformer", {"num_attention_heads": 5}, "5 heads do not divide"),
            ("vae", {"latent_channels": 16}, "64 latent channels for every 16 pixels"),
            ("text_encoder", {"text_config": {"model_type": "llama"}}, "'mistral' belongs here"),
            ("text_encoder", {"text_config": {"model_type": "mistral", "sliding_window": 64}}, "sliding_window of 64"),
        ),
    ),
    Tiny(
        write=write_tiny,
        command="generate-ernie-image-turbo",
        base_model="ernie-image-turbo",
        pipeline="mflux.models.ernie_image.variants.txt2img.ernie_image:ErnieImage",
        generate={"guidance": 1.0},
    ),
)


# ---- training


def _encoded(folder: Path, image, prompt: str, width: int, height: int, source):
    import torch

    pipeline = pipeline_reference(folder, "ErnieImagePipeline")
    with torch.no_grad():
        (embeds,) = pipeline.encode_prompt(prompt, "cpu")
        pixels = pipeline.image_processor.preprocess(image, height=height, width=width).numpy()
        inputs = {"image": pixels, "latents": np.zeros((1, 128, 2, 2), np.float32)}
        latents = run_vae_reference(pipeline.vae, inputs)[0]
    return latents, {"prompt_embeds": embeds[None]}


def _velocity(transformer, latents, sigma, cond, width: int, height: int, guidance: float):
    import torch

    embeds = cond["prompt_embeds"]
    lengths = torch.tensor([embeds.shape[1]])
    return transformer(latents, torch.tensor([1000 * sigma]), embeds, lengths, return_dict=False)[0]


TRAINING = (
    Training(
        name="training",
        model="ernie-image",
        write=write_ernie,
        pipeline="ErnieImagePipeline",
        transformer="ErnieImageTransformer2DModel",
        targets=(
            {"module_path": "layers.{block}.self_attention.to_q", "blocks": "all", "rank": 4, "alpha": 8},
            {"module_path": "layers.{block}.mlp.linear_fc2", "blocks": "all", "rank": 2},
            {"module_path": "layers.0.mlp.gate_proj", "rank": 3, "alpha": 1.5},
            # As mflux 0.24 calls it.
            {"module_path": "adaln_modulation", "rank": 3},
            {"module_path": "text_proj", "rank": 2, "alpha": 3},
            {"module_path": "final_linear", "rank": 2},
        ),
        encoded=_encoded,
        velocity=_velocity,
    ),
)

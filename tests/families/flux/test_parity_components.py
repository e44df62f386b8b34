"""FLUX.1's components and schedules against diffusers and transformers, on tiny checkpoints of random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from safetensors.torch import load_file, save_file
from support import reference
from support.reference import COMPONENT, normal, relative_error, save

from mflux.backend import mx
from mflux.checkpoints.loading import load_component
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.networks.autoencoders.kl import AutoencoderKL
from mflux.models.common.networks.text_encoders.clip import CLIPTextEncoder
from mflux.models.common.networks.text_encoders.t5 import T5Encoder, relative_position_buckets
from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator
from mflux.models.flux.model.transformer import FluxTransformer, latent_image_ids


def token_ids(batch: int, length: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocabulary, (batch, length))


# ---- CLIP

CLIP = {
    "quick_gelu, end token 2": dict(eos_token_id=2, hidden_act="quick_gelu"),
    "gelu, its own end token": dict(
        eos_token_id=40, hidden_act="gelu", hidden_size=40, num_attention_heads=5, num_hidden_layers=3, vocab_size=90
    ),
    "another epsilon": dict(eos_token_id=63, layer_norm_eps=1e-2, intermediate_size=24, num_attention_heads=2),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("settings", CLIP.values(), ids=CLIP)
@pytest.mark.parametrize("prefix", ["text_model.", ""], ids=["published", "without prefix"])
def test_clip(tmp_path, settings, batch, prefix):
    model = reference.clip_model(**settings)
    ours = load_component(CLIPTextEncoder, save(model, tmp_path, prefix=prefix))
    ids = token_ids(batch, 15, model.config.vocab_size)
    # End tokens in the middle and twice: the first one counts, or with end token 2 the highest id.
    if model.config.eos_token_id != 2:
        ids[:, [9, 12]] = model.config.eos_token_id
    theirs = model(torch.tensor(ids))
    states, pooled = ours(mx.array(ids))
    assert relative_error(states, theirs.last_hidden_state) <= COMPONENT
    assert relative_error(pooled, theirs.pooler_output) <= COMPONENT


def test_clip_at_full_length_and_without_an_end_token(tmp_path):
    model = reference.clip_model(eos_token_id=60)
    ours = load_component(CLIPTextEncoder, save(model, tmp_path))
    ids = token_ids(2, model.config.max_position_embeddings, 59)
    states, pooled = ours(mx.array(ids))
    theirs = model(torch.tensor(ids))
    assert relative_error(states, theirs.last_hidden_state) <= COMPONENT
    assert relative_error(pooled, theirs.pooler_output) <= COMPONENT


# ---- T5

T5 = {
    "gated, as published": dict(feed_forward_proj="gated-gelu"),
    "gated-silu, more heads": dict(feed_forward_proj="gated-silu", d_model=40, num_heads=5, d_kv=6, num_layers=3),
    "not gated": dict(feed_forward_proj="relu", d_ff=64, num_layers=1),
    "not gated, gelu": dict(feed_forward_proj="gelu", layer_norm_epsilon=1e-3),
    "other buckets": dict(relative_attention_num_buckets=12, relative_attention_max_distance=20),
}


@pytest.mark.parametrize("length", [1, 21, 170])
@pytest.mark.parametrize("settings", T5.values(), ids=T5)
def test_t5(tmp_path, settings, length):
    """170 tokens are further apart than the 128 that the buckets tell from each other."""
    model = reference.t5_model(**settings)
    ours = load_component(T5Encoder, save(model, tmp_path))
    ids = token_ids(3, length, model.config.vocab_size)
    assert relative_error(ours(mx.array(ids)), model(torch.tensor(ids)).last_hidden_state) <= COMPONENT


@pytest.mark.parametrize(
    "embedding", [["shared.weight"], ["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]]
)
def test_t5_embedding_names(tmp_path, embedding):
    model = reference.t5_model()
    ours = load_component(T5Encoder, save(model, tmp_path, embedding=embedding))
    ids = token_ids(1, 9, model.config.vocab_size)
    assert relative_error(ours(mx.array(ids)), model(torch.tensor(ids)).last_hidden_state) <= COMPONENT


@pytest.mark.parametrize("buckets, furthest", [(32, 128), (32, 64), (16, 256), (12, 20), (64, 1000)])
def test_t5_buckets(buckets, furthest):
    """Every distance falls into the reference's bucket, on the borders between two as well."""
    attention = (
        reference.t5_model(relative_attention_num_buckets=buckets, relative_attention_max_distance=furthest)
        .encoder.block[0]
        .layer[0]
        .SelfAttention
    )
    distances = np.arange(-1500, 1501)
    theirs = attention._relative_position_bucket(torch.tensor(distances), True, buckets, furthest)
    assert np.array_equal(relative_position_buckets(distances, buckets, furthest), theirs.numpy())


# ---- autoencoder

VAE = {
    "as FLUX.1's": dict(block_out_channels=[8, 8, 16, 16], layers_per_block=2, latent_channels=16),
    "quantization convolutions": dict(use_quant_conv=True, use_post_quant_conv=True),
    "no attention": dict(mid_block_add_attention=False, norm_num_groups=2, layers_per_block=2),
    "one quantization convolution": dict(use_quant_conv=True, block_out_channels=[12, 24, 12], norm_num_groups=3),
    "the other": dict(use_post_quant_conv=True, shift_factor=None, scaling_factor=0.18215, norm_num_groups=8),
    "grey": dict(in_channels=1, out_channels=2, latent_channels=3),
}


@pytest.mark.parametrize("batch, height, width", [(1, 24, 40), (3, 32, 16)])
@pytest.mark.parametrize("settings", VAE.values(), ids=VAE)
def test_autoencoder(tmp_path, settings, batch, height, width):
    model = reference.vae_model(**settings)
    ours = load_component(AutoencoderKL, save(model, tmp_path))
    config = model.config
    shift, factor = config.shift_factor or 0.0, config.scaling_factor

    image = np.tanh(normal(1, batch, config.in_channels, height, width))
    mean = (model.encode(torch.tensor(image)).latent_dist.mode() - shift) * factor
    assert relative_error(ours.encode(mx.array(image)), mean) <= COMPONENT

    latents = normal(2, *mean.shape)
    decoded = model.decode(torch.tensor(latents) / factor + shift).sample
    assert decoded.shape[2:] == (height, width)
    assert relative_error(ours.decode(mx.array(latents)), decoded) <= COMPONENT


# ---- transformer

TRANSFORMER = {
    "no guidance": dict(guidance_embeds=False),
    "guidance": dict(guidance_embeds=True, num_attention_heads=3, num_layers=1, num_single_layers=3),
    "only double blocks": dict(num_single_layers=0, num_layers=3, joint_attention_dim=16),
    "only single blocks": dict(num_layers=0, out_channels=12, guidance_embeds=True),
    "other axes": dict(attention_head_dim=20, axes_dims_rope=[2, 8, 10], patch_size=2, pooled_projection_dim=7),
}


@pytest.mark.parametrize("batch, rows, columns, length", [(1, 3, 5, 7), (3, 6, 2, 11)])
@pytest.mark.parametrize("settings", TRANSFORMER.values(), ids=TRANSFORMER)
def test_transformer(tmp_path, settings, batch, rows, columns, length):
    model = reference.transformer_model(**settings)
    ours = load_component(FluxTransformer, save(model, tmp_path))
    config = model.config
    latents = normal(1, batch, rows * columns, config.in_channels)
    text = normal(2, batch, length, config.joint_attention_dim)
    pooled = normal(3, batch, config.pooled_projection_dim)
    # One noise level and guidance for each sample, so that none can stand for all.
    sigma = np.linspace(1.0, 0.3, batch, dtype=np.float32)
    guidance = np.linspace(3.5, 2.0, batch, dtype=np.float32)

    theirs = model(
        hidden_states=torch.tensor(latents),
        encoder_hidden_states=torch.tensor(text),
        pooled_projections=torch.tensor(pooled),
        timestep=torch.tensor(sigma),
        guidance=torch.tensor(guidance) if config.guidance_embeds else None,
        img_ids=FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32),
        txt_ids=torch.zeros(length, 3),
    ).sample
    prediction = ours(
        mx.array(latents),
        sigma=mx.array(sigma),
        prompt_embeds=mx.array(text),
        pooled_prompt_embeds=mx.array(pooled),
        image_ids=latent_image_ids(rows, columns),
        guidance=mx.array(guidance) if config.guidance_embeds else None,
    )
    assert relative_error(prediction, theirs) <= COMPONENT


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 5), (8, 2)])
def test_image_ids(rows, columns):
    theirs = FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32)
    assert np.array_equal(np.array(latent_image_ids(rows, columns)), theirs.numpy())


@pytest.mark.parametrize("height, width", [(16, 16), (48, 80), (128, 32)])
def test_packing(height, width):
    """Equal, not close: values only change their places."""
    latents = normal(1, 3, 16, height // 8, width // 8)
    theirs = FluxPipeline._pack_latents(torch.tensor(latents), 3, 16, height // 8, width // 8)
    packed = FluxLatentCreator.pack_latents(mx.array(latents), height, width)
    assert np.array_equal(np.array(packed), theirs.numpy())
    unpacked = FluxPipeline._unpack_latents(theirs, height, width, 8)
    assert np.array_equal(np.array(FluxLatentCreator.unpack_latents(packed, height, width)), unpacked.numpy())
    assert np.array_equal(unpacked.numpy(), latents)


# ---- stored in bfloat16

STORED = {
    "clip": (CLIPTextEncoder, reference.clip_model, lambda: token_ids(2, 12, 64)),
    "t5": (T5Encoder, reference.t5_model, lambda: token_ids(2, 12, 64)),
    "vae": (AutoencoderKL, reference.vae_model, lambda: normal(1, 2, 4, 8, 6)),
}


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_files(tmp_path, kind, stored):
    """Where computation is float32, a 16-bit file means exactly its rounded weights."""
    ours_class, build, inputs = STORED[kind]
    model, values = build(), inputs()
    folder = save(model, tmp_path)
    store_as(folder, stored)
    ours = load_component(ours_class, folder, dtype=mx.float32)
    rounded = model.to(stored).float()
    if kind == "vae":
        scaled = torch.tensor(values) / model.config.scaling_factor + model.config.shift_factor
        theirs, result = rounded.decode(scaled).sample, ours.decode(mx.array(values))
    else:
        theirs, result = rounded(torch.tensor(values)).last_hidden_state, ours(mx.array(values))
        result = result[0] if kind == "clip" else result
    assert relative_error(result, theirs) <= COMPONENT


def store_as(folder, dtype: torch.dtype) -> None:
    for path in folder.glob("*.safetensors"):
        save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)


# ---- schedules

STEPS = [1, 2, 4, 7, 25, 50]
SIZES = [(128, 128), (512, 768), (1024, 1024), (2048, 1024)]


@pytest.mark.parametrize("kind", [*reference.SCHEDULERS, "other numbers", "terminal"])
@pytest.mark.parametrize("height, width", SIZES)
def test_sigmas(tmp_path, kind, height, width):
    """As FluxPipeline sets its scheduler up, from the same scheduler_config.json."""
    others = dict(
        use_dynamic_shifting=True, base_shift=0.2, max_shift=1.9, base_image_seq_len=100, max_image_seq_len=9000
    )
    settings = reference.SCHEDULERS | {"other numbers": others, "terminal": others | dict(shift_terminal=0.05)}
    settings = dict(base_image_seq_len=256, max_image_seq_len=4096, base_shift=0.5, max_shift=1.15) | settings[kind]
    FlowMatchEulerDiscreteScheduler(**settings).save_pretrained(tmp_path)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    for steps in STEPS:
        if kind == "terminal" and steps == 1:
            continue  # The reference divides 0 by 0 there.
        length = (height // 16) * (width // 16)
        numbers = (scheduler.config[name] for name in
                   ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"))  # fmt: skip
        shift = calculate_shift(length, *numbers)
        sigmas = np.linspace(1.0, 1 / steps, steps)
        timesteps, _ = retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=shift)
        model_config = ModelConfig.dev().with_scheduler(config)
        ours = Config(model_config, num_inference_steps=steps, height=height, width=width).scheduler
        assert ours.sigmas.shape == (steps + 1,)
        assert torch.isfinite(scheduler.sigmas).all()
        np.testing.assert_allclose(np.array(ours.sigmas), scheduler.sigmas.numpy(), rtol=0, atol=3e-7)
        np.testing.assert_allclose(np.array(ours.timesteps), timesteps.numpy(), rtol=0, atol=3e-4)


@pytest.mark.parametrize("name", ["schnell", "dev", "krea-dev"])
def test_built_in_settings_are_the_published_schedule(name, published):
    """A checkpoint's scheduler_config.json says nothing that the built-in model does not say already."""
    config = published["FLUX.1-schnell" if name == "schnell" else "FLUX.1-dev"]["scheduler"]["config"]
    built_in = ModelConfig.from_name(name)
    plain = Config(built_in, num_inference_steps=6, height=512, width=768).scheduler
    told = Config(built_in.with_scheduler(config), num_inference_steps=6, height=512, width=768).scheduler
    assert plain.sigmas.tolist() == told.sigmas.tolist()


def test_one_step_of_the_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4))
    config = ModelConfig.dev().with_scheduler(dict(shift=3.0, use_dynamic_shifting=False))
    ours = Config(config, num_inference_steps=4, height=64, width=64).scheduler
    latents, noise = normal(1, 1, 16, 64), normal(2, 1, 16, 64)
    for step, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(torch.tensor(noise), timestep, torch.tensor(latents)).prev_sample
        assert relative_error(ours.step(mx.array(noise), step, mx.array(latents)), theirs) <= 1e-6

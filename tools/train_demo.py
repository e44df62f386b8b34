"""Train the embedded model: a FLUX-architecture checkpoint small enough to ship in the wheel.

Five stages, each resumable, each leaving its result in the work folder:

1. tokenizers  a byte-level BPE for CLIP and a unigram for T5 over the captions' words
2. vae         diffusers' AutoencoderKL, on crops that grow to whole pictures
3. flow        latents of all training scenes once; then transformer, CLIP and T5 together, on the straight-path
               flow-matching objective (Liu et al. 2022, Esser et al. 2024): predict noise - latents at time sigma
4. decoder     the autoencoder's decoder alone once more, on latents as the flow leaves them, for clean outlines
5. export      moving averages, rounded to bfloat16, in the published folder layout

    python tools/train_demo.py --work /tmp/demo-training [--stage vae] [--out src/mflux/demo/checkpoint]

Needs torch, diffusers, transformers, tokenizers and safetensors; under two hours on two CPU cores that do nothing else.
Seeded: the same library versions and thread count give the same model.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from demo_scenes import COLOURS, every_scene, render
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

SIDE = 128
TEXT_LENGTH = 32
VAE = dict(
    block_out_channels=[16, 32, 64, 64],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=1,
    latent_channels=16,
    norm_num_groups=1,
    use_quant_conv=False,
    use_post_quant_conv=False,
    sample_size=SIDE,
)
TRANSFORMER = dict(
    patch_size=1,
    in_channels=64,
    num_layers=1,
    num_single_layers=4,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=64,
    pooled_projection_dim=64,
    axes_dims_rope=[8, 12, 12],
    guidance_embeds=False,
)
CLIP = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, projection_dim=64)
T5 = dict(d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu", dropout_rate=0.0)


# ---------------------------------------------------------------------------------------------------- tokenizers


def train_tokenizers(work: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    captions = sorted({scene.caption for scene in every_scene()})
    captions += [caption.replace("a orange", "an orange") for caption in captions if "a orange" in caption]

    # CLIP: lower case, words split off, bytes as characters, "</w>" ends a word.
    folder = work / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    clip = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    clip.normalizer = normalizers.Lowercase()
    split = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    clip.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    clip.train_from_iterator(captions, trainer)
    learned = json.loads(clip.to_str())["model"]
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in learned["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    vocabulary = list(dict.fromkeys(vocabulary)) + ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: number for number, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "do_lower_case": True,
            "model_max_length": TEXT_LENGTH,
        },
    )
    special = {
        "bos_token": "<|startoftext|>",
        **dict.fromkeys(["eos_token", "pad_token", "unk_token"], "<|endoftext|>"),
    }
    write_json(folder / "special_tokens_map.json", special)

    # T5: whole words of the captions, then single characters, so that nothing common is unknown.
    folder = work / "tokenizer_2"
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for caption in captions for word in caption.replace(",", "").split()})
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    pieces += [("\u2581" + word, -2.0) for word in words] + [(character, -8.0) for character in characters]
    t5 = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    t5.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    t5.pre_tokenizer = pre_tokenizers.Metaspace()
    t5.decoder = decoders.Metaspace()
    t5.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    t5.add_special_tokens(["<pad>", "</s>", "<unk>"])
    t5.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "T5TokenizerFast",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "extra_ids": 0,
            "model_max_length": 512,
        },
    )


class Tokens:
    """Ids of a caption as the two text encoders want them, from the `tokenizers` package alone."""

    def __init__(self, work: Path):
        from tokenizers import Tokenizer

        from mflux.models.common.tokenizers.prompt_tokenizers import clip_tokenizer

        self.clip = clip_tokenizer(work / "tokenizer")
        self.t5 = Tokenizer.from_file(str(work / "tokenizer_2" / "tokenizer.json"))

    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        clip = [self.clip.encode(caption, max_length=TEXT_LENGTH) for caption in captions]
        t5 = [self.t5.encode(caption).ids for caption in captions]
        t5 = [ids[:TEXT_LENGTH] + [0] * (TEXT_LENGTH - len(ids)) for ids in t5]
        return torch.tensor(clip), torch.tensor(t5)


# ----------------------------------------------------------------------------------------------------------- vae


def vae_picture(rng: np.random.Generator, scenes) -> np.ndarray:
    """A picture for the autoencoder: mostly scenes; else a few shapes of any colour, stars and stripes among them."""
    if rng.random() < 0.6:
        return render(scenes[rng.integers(len(scenes))], SIDE, SIDE, rng)
    colours = list(COLOURS.values())

    def colour():
        if rng.random() < 0.5:
            return colours[rng.integers(len(colours))]
        return tuple(int(value) for value in rng.integers(0, 256, 3))

    scale = 4
    canvas = Image.new("RGB", (SIDE * scale, SIDE * scale), colour())
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(1, 5)):
        x, y = rng.uniform(0.1, 0.9, 2) * SIDE * scale
        radius = rng.uniform(0.08, 0.4) * SIDE * scale
        kind = rng.integers(4)
        if kind == 0:
            draw.ellipse([x - radius, y - radius * rng.uniform(0.5, 1), x + radius, y + radius * 0.8], fill=colour())
        elif kind == 1:
            draw.rectangle([x - radius, y - radius * rng.uniform(0.1, 1), x + radius, y + radius * 0.7], fill=colour())
        else:
            corners = 2 * int(rng.integers(3, 8)) if kind == 2 else int(rng.integers(3, 8))
            turn = rng.uniform(0, math.tau) if rng.random() < 0.5 else -math.pi / 2
            inner = rng.uniform(0.35, 0.6) if kind == 2 else 1.0
            points = []
            for corner in range(corners):
                reach = radius * (inner if corner % 2 else 1.0)
                angle = turn + corner * math.tau / corners
                points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
            draw.polygon(points, fill=colour())
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX))


# What the latents carry beside their mean. Published posteriors have a spread as well: it is learned to be this.
LATENT_NOISE = 0.1
# (crop side, batch, share of the steps): small crops first, because the number of steps is what teaches colour.
CURRICULUM = [(32, 8, 0.4), (64, 6, 0.45), (SIDE, 4, 0.15)]


def pass_colours_through(vae: AutoencoderKL) -> None:
    """Start from an autoencoder that hands colours on, as a very small picture.

    Normalisation forgets how bright a picture is, and from the usual random start a net this narrow needs hours to
    find a way round. With one channel that is large and constant, mean and spread of a norm are nearly constant too,
    so the others keep their values; identity kernels in the convolutions that no skip bypasses carry them along.
    """
    with torch.no_grad():
        for name, layer in vae.named_modules():
            if not isinstance(layer, torch.nn.Conv2d):
                continue
            if name.endswith(("conv_in", "conv_out", "conv_shortcut")) or "sampler" in name:
                random = 0.2 * layer.weight
                torch.nn.init.dirac_(layer.weight).add_(random)
                layer.bias.zero_()
            if name.endswith("conv2"):
                layer.weight.mul_(0.2)
                layer.bias.zero_()
            if name.endswith("conv_in"):
                layer.bias[3] = 4.0
        vae.encoder.conv_out.weight[3] = 0.0


def train_vae(work: Path, steps: int) -> None:
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    scenes = every_scene()
    vae = AutoencoderKL(**VAE)
    pass_colours_through(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    average = copy.deepcopy(vae).requires_grad_(False)
    start, state = resume(work / "vae.pt", vae=vae, optimizer=optimizer, average=average)
    if state:
        rng.bit_generator.state = state
    clock, errors = time.time(), []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            warm, done = min(1.0, (step + 1) / 100), step / steps
            group["lr"] = 1e-3 * warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))
        passed = 0.0
        for side, batch, share in CURRICULUM:  # noqa: B007
            passed += share * steps
            if step < passed:
                break
        crops = []
        while len(crops) < batch:
            picture = vae_picture(rng, scenes)
            for _ in range(2 if side < SIDE else 1):
                y, x = rng.integers(0, SIDE - side + 1, 2)
                crops.append(picture[y : y + side, x : x + side])
        pixels = as_pixels(np.stack(crops))
        posterior = vae.encode(pixels).latent_dist
        latents = posterior.mean + LATENT_NOISE * torch.randn_like(posterior.mean)
        decoded = vae.decode(latents).sample
        error = (decoded - pixels).abs().mean()
        size = (posterior.mean**2).mean()
        spread = ((posterior.logvar - 2 * math.log(LATENT_NOISE)) ** 2).mean()
        loss = error + 2 * ((decoded - pixels) ** 2).mean() + 2e-3 * size + 1e-4 * spread
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        blend(average, vae, 0.998 if step > 2000 else 0.99)
        errors.append(error.item())
        if step % 100 == 0 or step == steps - 1:
            print(
                f"vae {step}/{steps} side {side} error {np.mean(errors[-100:]):.4f} size {size.item():.2f} "
                f"{time.time() - clock:.0f}s",
                flush=True,
            )
        if step % 500 == 499 or step == steps - 1:
            save(work / "vae.pt", step + 1, rng, vae=vae, optimizer=optimizer, average=average)


# ---------------------------------------------------------------------------------------------------------- flow


def latent_bank(work: Path, variants: int) -> tuple[torch.Tensor, list]:
    """Latents of every training scene, several jittered drawings each: (N, 64, 64) packed, and N captions' scenes."""
    scenes = [scene for scene in every_scene() if not scene.held_out]
    path = work / "latents.pt"
    if path.exists():
        return torch.load(path), scenes
    vae = AutoencoderKL(**VAE)
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=False)["average"])
    vae.eval()
    rng = np.random.default_rng(2)
    bank = torch.empty(len(scenes), variants, 16, SIDE // 8, SIDE // 8)
    with torch.no_grad():
        for index, scene in enumerate(scenes):
            pictures = np.stack([render(scene, SIDE, SIDE, rng) for _ in range(variants)])
            bank[index] = vae.encode(as_pixels(pictures)).latent_dist.mean
            if index % 500 == 0:
                print(f"latents {index}/{len(scenes)}", flush=True)
    torch.save(bank, path)
    return bank, scenes


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, 16, h, w) to FLUX's sequence of 2x2 patches, (B, h/2 * w/2, 64)."""
    batch, channels, height, width = latents.shape
    latents = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return latents.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(latents: torch.Tensor, side: int) -> torch.Tensor:
    """The way back from `pack`, for a square of `side` tokens a side."""
    batch = len(latents)
    latents = latents.view(batch, side, side, 16, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(batch, 16, 2 * side, 2 * side)


def positions(height: int, width: int) -> torch.Tensor:
    """Row and column of each image token: (height * width, 3), the first column zero."""
    grid = torch.zeros(height, width, 3)
    grid[..., 1] = torch.arange(height)[:, None]
    grid[..., 2] = torch.arange(width)[None, :]
    return grid.reshape(-1, 3)


def build_flow(work: Path) -> torch.nn.ModuleDict:
    vocabulary = json.loads((work / "tokenizer" / "vocab.json").read_text())
    pieces = json.loads((work / "tokenizer_2" / "tokenizer.json").read_text())["model"]["vocab"]
    clip = CLIPTextConfig(
        vocab_size=len(vocabulary),
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
        **CLIP,
    )
    t5 = T5Config(vocab_size=len(pieces), decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **T5)
    t5.is_encoder_decoder = False
    return torch.nn.ModuleDict(
        {
            "transformer": FluxTransformer2DModel(**TRANSFORMER),
            "text_encoder": CLIPTextModel(clip),
            "text_encoder_2": T5EncoderModel(t5),
        }
    )


def train_flow(work: Path, steps: int, batch: int, variants: int, highest_rate: float) -> None:
    bank, scenes = latent_bank(work, variants)
    shift, scale = bank.mean().item(), 1.0 / bank.std().item()
    write_json(work / "latent_statistics.json", {"shift_factor": shift, "scaling_factor": scale})
    latents = pack((bank.flatten(0, 1) - shift) * scale).view(len(scenes), variants, -1, 64)
    del bank
    tokens = Tokens(work)
    clip_ids, t5_ids = tokens([scene.caption for scene in scenes])
    clip_an, t5_an = tokens([scene.caption.replace("a orange", "an orange") for scene in scenes])

    torch.manual_seed(3)
    rng = np.random.default_rng(3)
    model = build_flow(work)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    start, state = resume(work / "flow.pt", model=model, optimizer=optimizer, average=average)
    if state:
        rng.bit_generator.state = state
    text_positions = torch.zeros(TEXT_LENGTH, 3)
    image_positions = positions(SIDE // 16, SIDE // 16)
    clock, losses = time.time(), []
    for step in range(start, steps):
        fraction = step / steps
        rate = highest_rate * min(1.0, (step + 1) / 300) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * fraction)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.from_numpy(rng.integers(len(scenes), size=batch))
        clean = latents[chosen, torch.from_numpy(rng.integers(variants, size=batch))]
        with_an = torch.from_numpy(rng.random(batch) < 0.3)[:, None]
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
        # Half uniform, half bell-shaped in logit space: the ends need practice too when few steps are taken.
        sigma = np.where(rng.random(batch) < 0.5, rng.random(batch), 1 / (1 + np.exp(-rng.standard_normal(batch))))
        sigma = torch.from_numpy(sigma.astype(np.float32))[:, None, None]
        velocity = model["transformer"](
            hidden_states=(1 - sigma) * clean + sigma * noise,
            timestep=sigma[:, 0, 0],
            pooled_projections=model["text_encoder"](pick(clip_ids, clip_an, chosen, with_an)).pooler_output,
            encoder_hidden_states=model["text_encoder_2"](pick(t5_ids, t5_an, chosen, with_an)).last_hidden_state,
            txt_ids=text_positions,
            img_ids=image_positions,
            return_dict=False,
        )[0]
        loss = ((velocity - (noise - clean)) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        blend(average, model, min(0.999, (step + 1) / (step + 10)))
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"flow {step}/{steps} loss {np.mean(losses[-50:]):.4f} {time.time() - clock:.0f}s", flush=True)
        if step % 250 == 249 or step == steps - 1:
            save(work / "flow.pt", step + 1, rng, model=model, optimizer=optimizer, average=average)


def pick(plain: torch.Tensor, with_an: torch.Tensor, chosen: torch.Tensor, wants_an: torch.Tensor) -> torch.Tensor:
    return torch.where(wants_an, with_an[chosen], plain[chosen])


# ------------------------------------------------------------------------------------------------------- decoder


def drafts(work: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents as the trained flow leaves them, with the pictures that they should have been.

    Each starts from a training picture's latents with some of the noise that sampling starts from, and the flow takes
    the rest of the way: the noisy latents still show place and size, so those stay, and the outlines carry the
    flow's own errors.

    Returns:
        Latents (count, 16, 16, 16) as the decoder takes them, and pictures (count, 128, 128, 3), uint8.
    """
    path = work / "drafts.pt"
    if path.exists():
        return torch.load(path)
    torch.manual_seed(5)
    rng = np.random.default_rng(5)
    scenes = [scene for scene in every_scene() if not scene.held_out]
    statistics = json.loads((work / "latent_statistics.json").read_text())
    shift, scale = statistics["shift_factor"], statistics["scaling_factor"]
    vae = AutoencoderKL(**VAE)
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=False)["average"])
    model = build_flow(work)
    model.load_state_dict(torch.load(work / "flow.pt", weights_only=False)["average"])
    model.eval()
    tokens, side, batch = Tokens(work), SIDE // 16, 64
    all_latents, all_pictures = [], []
    with torch.no_grad():
        for start in range(0, count, batch):
            chosen = [scenes[index] for index in rng.integers(len(scenes), size=batch)]
            pictures = np.stack([render(scene, SIDE, SIDE, rng) for scene in chosen])
            latents = pack((vae.encode(as_pixels(pictures)).latent_dist.mean - shift) * scale)
            clip_ids, t5_ids = tokens([scene.caption for scene in chosen])
            words = dict(
                pooled_projections=model["text_encoder"](clip_ids).pooler_output,
                encoder_hidden_states=model["text_encoder_2"](t5_ids).last_hidden_state,
                txt_ids=torch.zeros(TEXT_LENGTH, 3),
                img_ids=positions(side, side),
            )
            # The last three to seven of the eight steps that the model is drawn with.
            left = 3 + start // batch % 5
            latents = latents + left / 8 * (torch.randn_like(latents) - latents)
            for step in range(left, 0, -1):
                sigma = torch.full((batch,), step / 8)
                latents = latents - model["transformer"](latents, timestep=sigma, **words, return_dict=False)[0] / 8
            all_latents.append(unpack(latents, side) / scale + shift)
            all_pictures.append(torch.from_numpy(pictures))
            if start // batch % 10 == 0:
                print(f"drafts {start}/{count}", flush=True)
    result = torch.cat(all_latents), torch.cat(all_pictures)
    torch.save(result, path)
    return result


def polish_decoder(work: Path, steps: int) -> None:
    """Clean outlines: the decoder alone, on latents as the flow leaves them, and on any picture's as they are."""
    torch.manual_seed(4)
    rng = np.random.default_rng(4)
    scenes = every_scene()
    rough, meant = drafts(work, 4096)
    vae = AutoencoderKL(**VAE)
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=False)["average"])
    vae.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    average = copy.deepcopy(vae).requires_grad_(False)
    start, state = resume(work / "decoder.pt", vae=vae, optimizer=optimizer, average=average)
    if state:
        rng.bit_generator.state = state
    clock, errors = time.time(), []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                6e-4 * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
            )
        other = torch.from_numpy(vae_picture(rng, scenes))[None]
        with torch.no_grad():
            exact = vae.encode(as_pixels(other)).latent_dist.mean
        exact = exact + 0.15 * rng.random() * torch.randn_like(exact)
        chosen = torch.from_numpy(rng.integers(len(rough), size=4))
        pixels = as_pixels(torch.cat([meant[chosen], other]))
        decoded = vae.decode(torch.cat([rough[chosen], exact])).sample
        error = (decoded - pixels).abs().mean()
        loss = error + 2 * ((decoded - pixels) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        blend(average, vae, min(0.995, (step + 1) / (step + 10)))
        errors.append(error.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"decoder {step}/{steps} error {np.mean(errors[-50:]):.4f} {time.time() - clock:.0f}s", flush=True)
        if step % 250 == 249 or step == steps - 1:
            save(work / "decoder.pt", step + 1, rng, vae=vae, optimizer=optimizer, average=average)


# -------------------------------------------------------------------------------------------------------- export


def export(work: Path, out: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    model = build_flow(work)
    model.load_state_dict(torch.load(work / "flow.pt", weights_only=False)["average"])
    vae = AutoencoderKL(**VAE, **json.loads((work / "latent_statistics.json").read_text()))
    vae.load_state_dict(torch.load(work / "decoder.pt", weights_only=False)["average"])
    parts = {**model, "vae": vae}
    if out.exists():
        shutil.rmtree(out)
    for name, part in parts.items():
        part.to(torch.bfloat16).save_pretrained(out / name)
    # CLIP's published files put every name under "text_model."; transformers 5 leaves the prefix out.
    path = out / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {name if name.startswith("text_model.") else f"text_model.{name}": value for name, value in tensors.items()},
        path,
        metadata={"format": "pt"},
    )
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=False).save_pretrained(
        out / "scheduler"
    )
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(work / name, out / name)
    (out / "text_encoder" / "generation_config.json").unlink(missing_ok=True)
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(out / "model_index.json", index)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"exported {out}: {size / 1e6:.2f} MB")


# -------------------------------------------------------------------------------------------------------- shared


def as_pixels(pictures: np.ndarray | torch.Tensor) -> torch.Tensor:
    """(B, height, width, 3), 0 to 255, to (B, 3, height, width), -1 to 1."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def blend(average: torch.nn.Module, model: torch.nn.Module, keep: float) -> None:
    with torch.no_grad():
        for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast, 1 - keep)


def save(path: Path, step: int, rng: np.random.Generator, **parts) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    temporary = path.with_suffix(".partial")
    torch.save({"step": step, "rng": rng.bit_generator.state, "torch_rng": torch.get_rng_state(), **state}, temporary)
    temporary.replace(path)


def resume(path: Path, **parts):
    if not path.exists():
        return 0, None
    state = torch.load(path, weights_only=False)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["torch_rng"])
    return state["step"], state["rng"]


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and latents; may be resumed")
    parser.add_argument("--out", type=Path, default=Path("src/mflux/demo/checkpoint"))
    parser.add_argument("--stage", choices=["tokenizers", "vae", "flow", "decoder", "export"], help="only this one")
    parser.add_argument("--vae-steps", type=int, default=6000)
    parser.add_argument("--decoder-steps", type=int, default=2000)
    parser.add_argument("--flow-steps", type=int, default=7000)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate of the flow")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--variants", type=int, default=4, help="drawings of each training scene")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    arguments.work.mkdir(parents=True, exist_ok=True)
    stages = {
        "tokenizers": lambda: train_tokenizers(arguments.work),
        "vae": lambda: train_vae(arguments.work, arguments.vae_steps),
        "flow": lambda: train_flow(
            arguments.work, arguments.flow_steps, arguments.batch, arguments.variants, arguments.rate
        ),
        "decoder": lambda: polish_decoder(arguments.work, arguments.decoder_steps),
        "export": lambda: export(arguments.work, arguments.out),
    }
    for name, run in stages.items():
        if arguments.stage in (None, name):
            run()


if __name__ == "__main__":
    main()

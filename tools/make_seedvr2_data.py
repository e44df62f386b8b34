"""Make tests/data/seedvr2: what the public SeedVR2 computes from small random weights and inputs.

    git clone https://github.com/numz/ComfyUI-SeedVR2_VideoUpscaler /tmp/seedvr2-code
    git -C /tmp/seedvr2-code checkout 4490bd1
    python -m venv /tmp/old && /tmp/old/bin/pip install torch diffusers transformers einops rotary-embedding-torch
    /tmp/old/bin/python tools/make_seedvr2_data.py /tmp/seedvr2-code

No package has that code, so the tests compare with these files. It runs on a CPU, in float32; what it is given is drawn
so that float16 holds it exactly, which halves the files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "data" / "seedvr2"
CONFIGS = ROOT / "tests" / "data" / "surface" / "configs.json"
EMBEDDING = ROOT / "src" / "mflux" / "models" / "seedvr2" / "pos_emb.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of the reference at 4490bd1")
    parser.add_argument("--only", choices=sorted(MAKERS), help="make one file")
    args = parser.parse_args()
    sys.path.insert(0, str(args.checkout))
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    for name, make in MAKERS.items():
        if args.only in (None, name):
            path = FOLDER / f"{name}.safetensors"
            tensors, metadata = make(args.checkout)
            save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
            print(f"{path}: {path.stat().st_size:,} bytes")
    if args.only is None:
        write_names()


def halves(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Normally distributed numbers that float16 holds exactly, as float32."""
    return torch.randn(*shape, generator=generator).half().float()


# ---- colours


def picture(generator: torch.Generator, height: int, width: int, amplitude: float, tint: list[float]) -> torch.Tensor:
    """Slow waves, some detail and a tint: (3, height, width)."""
    rows = torch.linspace(0, 5, height)[:, None]
    columns = torch.linspace(0, 7, width)[None]
    waves = torch.stack([torch.sin(rows * (1 + channel) + columns * (2 - channel)) for channel in range(3)])
    detail = torch.randn(3, height, width, generator=generator)
    return amplitude * (0.5 * waves + 0.2 * detail) + torch.tensor(tint)[:, None, None]


def colour_functions() -> types.ModuleType:
    # Of torchvision it takes two names that nothing here calls; they come in last, since others look for it.
    import diffusers.models.autoencoders.vae  # noqa: F401

    stand_in = types.ModuleType("torchvision.transforms")
    stand_in.ToTensor = stand_in.ToPILImage = None
    sys.modules.setdefault("torchvision", types.ModuleType("torchvision"))
    sys.modules.setdefault("torchvision.transforms", stand_in)
    from src.utils import color_fix

    return color_fix


def colours(_: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Pictures (H, W, 3) in about [-1, 1]: `content` takes the colours of `style`."""
    functions = colour_functions()
    log = types.SimpleNamespace(log=lambda *_, **__: None)
    generator = torch.Generator().manual_seed(1)
    # The radius of a blur is at most an eighth of the shorter side: 2, 5 and 16.
    cases = {
        "narrow": (41, 17, 0.8, 1),
        "wide": (40, 56, 1.2, 1),
        "large": (128, 136, 0.9, 4),
    }
    tensors = {}
    for name, (height, width, amplitude, every) in cases.items():
        content = picture(generator, height, width, amplitude, [0.2, -0.1, 0.0]).half().float()[None]
        style = picture(generator, height, width, 0.8, [-0.2, 0.1, 0.15]).clamp(-1, 1).half().float()[None]
        wavelet = functions.wavelet_reconstruction(content.clone(), style.clone())
        lab = functions.lab_color_transfer(content.clone(), style.clone(), log)
        ties = wavelet[0].flatten(1).unique(dim=1).shape[1] < height * width
        assert not ties, "pixels of one colour have no order, so which of them gets which rank says nothing"
        for what, value in {"content": content, "style": style}.items():
            tensors[f"{name}.{what}"] = value[0].permute(1, 2, 0).half()
        for what, value in {"wavelet": wavelet, "lab": lab}.items():
            tensors[f"{name}.{what}"] = value[0].permute(1, 2, 0)[::every, ::every]
    return tensors, {"large": "of wavelet and lab every fourth row and column"}


# ---- networks


@torch.no_grad()
def draw(model: torch.nn.Module, generator: torch.Generator) -> torch.nn.Module:
    """Draw every parameter so that values stay about 1, and float16 holds it."""
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("bias", "_shift")):
            values = 0.3 * values
        elif name.endswith("_gate"):
            values = 0.7 * values
        elif parameter.ndim == 1:
            values = 1 + 0.3 * values
        else:
            values = values / parameter[0].numel() ** 0.5
        parameter.copy_(values.half())
    return model.eval().requires_grad_(False)


def file_of(model, config, inputs, outputs) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Weights and inputs as float16, which holds them exactly; outputs as they are."""
    named = {f"weights/{name}": value for name, value in model.state_dict().items()}
    named |= {f"inputs/{name}": value for name, value in inputs.items()}
    halved = {name: value.half() for name, value in named.items()}
    assert all(torch.equal(halved[name].float(), named[name]) for name in named if not name.endswith("rope.freqs"))
    return halved | {f"outputs/{name}": value for name, value in outputs.items()}, {"config": json.dumps(config)}


def transformer(config: dict) -> torch.nn.Module:
    """The reference class for a configuration, of whichever kind."""
    common = dict(
        norm="fusedrms",
        ada="single",
        qk_norm="fusedrms",
        block_type="mmdit_sr",
        window_method=["720pwin_by_size_bysize", "720pswin_by_size_bysize"] * (config["num_layers"] // 2),
    )
    keywords = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    if config["rope_type"] is not None:
        from src.models.dit_3b.nadit import NaDiT

        return NaDiT(**keywords, **common)
    from src.models.dit_7b.nadit import NaDiT

    # What it has no choice of: everything in all blocks apart, half a head's channels for positions.
    assert keywords.pop("mm_layers") == config["num_layers"]
    assert keywords.pop("rope_dim") == config["head_dim"] // 2
    del keywords["rope_type"]
    assert keywords.pop("vid_out_norm") is None
    return NaDiT(**keywords, **common, qk_rope=True, shared_qkv=False, shared_mlp=False)


# Small in everything but the picture, which has to have several windows along each side.
SMALL = dict(
    vid_in_channels=5, vid_out_channels=2, vid_dim=24, txt_in_dim=20, txt_dim=24, emb_dim=144, heads=2, head_dim=20,
    expand_ratio=4, norm_eps=1e-5, qk_bias=False, patch_size=[1, 2, 2], num_layers=4, mm_layers=2, mlp_type="swiglu",
    rope_type="mmrope3d", rope_dim=18, vid_out_norm="fusedrms", window=[4, 3, 3],
)  # fmt: skip
TRANSFORMERS = {
    # As published: separate, then shared weights; the last block leaves the text.
    "transformer_3b": SMALL,
    # The last block has weights of its own for the picture and none for the text; other constants.
    "transformer_3b_separate": SMALL
    | dict(
        num_layers=2, mlp_type="normal", vid_out_norm=None, expand_ratio=2, norm_eps=1e-2, qk_bias=True, rope_dim=12,
        window=[4, 4, 2], patch_size=[1, 2, 1],
    ),
    "transformer_7b": SMALL
    | dict(
        mlp_type="normal", rope_type=None, vid_out_norm=None, num_layers=2, mm_layers=2, head_dim=36, rope_dim=18,
    ),
}  # fmt: skip
# Rows and columns of latents, words, and time. In patches: more windows than one along each side and borders between
# two patches; a strip that is cut in one direction only; a picture that is one window.
INPUTS = {"large": (60, 88, 5, 1000.0), "strip": (8, 260, 3, 730.5), "small": (12, 8, 1, 40.0)}


def transformer_data(name: str):
    def make(_: Path):
        config = TRANSFORMERS[name]
        generator = torch.Generator().manual_seed(len(name))
        model = draw(transformer(config), generator)
        inputs, outputs = {}, {}
        for case, (height, width, length, time) in INPUTS.items():
            if name.endswith("separate"):
                height, width = width, height
            latents = halves(generator, height, width, config["vid_in_channels"])
            text = halves(generator, length, config["txt_in_dim"])
            inputs |= {f"{case}.latents": latents, f"{case}.text": text, f"{case}.time": torch.tensor([time])}
            velocity = model(
                vid=latents.reshape(-1, latents.shape[-1]),
                txt=text,
                vid_shape=torch.tensor([[1, height, width]]),
                txt_shape=torch.tensor([[length]]),
                timestep=torch.tensor([time]),
            ).vid_sample
            outputs[case] = velocity.reshape(height, width, -1)
        return file_of(model, config, inputs, outputs)

    return make


def autoencoder(config: dict) -> torch.nn.Module:
    from src.models.video_vae_v3.modules.attn_video_vae import VideoAutoencoderKLWrapper

    others = {"decoder_layers_per_block", "scaling_factor", "shift_factor"}
    levels = len(config["block_out_channels"])
    blocks = dict(down_block_types=("DownEncoderBlock3D",) * levels, up_block_types=("UpDecoderBlock3D",) * levels)
    keywords = blocks | {name: value for name, value in config.items() if name not in others}
    return VideoAutoencoderKLWrapper(**keywords, freeze_encoder=False)


TINY_AUTOENCODER = dict(
    act_fn="silu", block_out_channels=[4, 8, 8, 12], in_channels=3, out_channels=3, latent_channels=2,
    layers_per_block=1, norm_num_groups=2, temporal_scale_num=2, inflation_mode="pad", spatial_downsample_factor=8,
    temporal_downsample_factor=4, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.9152,
)  # fmt: skip
AUTOENCODERS = {
    "autoencoder": TINY_AUTOENCODER,
    "autoencoder_other": TINY_AUTOENCODER
    | dict(
        block_out_channels=[8, 4, 8], latent_channels=3, layers_per_block=2, norm_num_groups=2, temporal_scale_num=1,
        down_block_types=["DownEncoderBlock3D"] * 3, up_block_types=["UpDecoderBlock3D"] * 3, scaling_factor=0.5,
        spatial_downsample_factor=4, temporal_downsample_factor=2, use_quant_conv=True, use_post_quant_conv=True,
    ),
}  # fmt: skip


def autoencoder_data(name: str):
    def make(_: Path):
        config = AUTOENCODERS[name]
        generator = torch.Generator().manual_seed(len(name))
        model = draw(autoencoder(config), generator)
        factor = config["spatial_downsample_factor"]
        pixels = (0.5 * halves(generator, 2, 5 * factor, 7 * factor, 3)).half().float()
        latents = halves(generator, 2, 5, 3, config["latent_channels"])
        encoded = model.encode(pixels.permute(0, 3, 1, 2)[:, :, None]).latent * config["scaling_factor"]
        decoded = model.decode(latents.permute(0, 3, 1, 2)[:, :, None] / config["scaling_factor"]).sample
        inputs = {"pixels": pixels, "latents": latents}
        outputs = {"encoded": encoded, "decoded": decoded}
        outputs = {name: value.reshape(*value.shape[:2], *value.shape[-2:]) for name, value in outputs.items()}
        return file_of(model, config, inputs, {name: value.permute(0, 2, 3, 1) for name, value in outputs.items()})

    return make


# ---- a whole picture


def whole(_: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """From a picture at the size that it is to have, to its colours again: with the weights of `transformer_3b` and of
    `autoencoder`, and the constant text, for which the text's layer is repeated."""
    functions = colour_functions()
    parts = {}
    for name, build, config in (
        ("transformer_3b", transformer, TRANSFORMERS["transformer_3b"] | {"txt_in_dim": 5120}),
        ("autoencoder", autoencoder, TINY_AUTOENCODER),
    ):
        weights = {
            key.removeprefix("weights/"): value.float()
            for key, value in load_file(FOLDER / f"{name}.safetensors").items()
            if key.startswith("weights/")
        }
        if "txt_in.weight" in weights:
            weights["txt_in.weight"] = weights["txt_in.weight"].repeat(1, 256) / 16
        parts[name] = build(config).eval()
        missing, left = parts[name].load_state_dict(weights, strict=False)
        assert not missing and not left, (missing, left)
    generator = torch.Generator().manual_seed(7)
    text = load_file(EMBEDDING)["embedding"].float()
    factor = TINY_AUTOENCODER["scaling_factor"]
    log = types.SimpleNamespace(log=lambda *_, **__: None)
    tensors = {}
    # Filled up to multiples of 16 with black on the right and at the bottom, and not at all.
    for name, (height, width) in {"uneven": (40, 54), "even": (48, 32)}.items():
        small = picture(generator, height, width, 0.8, [0.1, -0.2, 0.0]).clamp(-1, 1)
        pixels = ((small + 1) * 127.5).round().to(torch.uint8)
        small = pixels.float()[None] / 127.5 - 1
        rows, columns = (-(-side // 16) * 16 for side in (height, width))
        filled = pad(small, (0, columns - width, 0, rows - height), value=-1.0)
        condition = parts["autoencoder"].encode(filled[:, :, None]).latent * factor
        noise = halves(generator, *condition.shape)
        latents = torch.cat([noise, condition, torch.ones_like(condition[:, :1])], dim=1)[0].permute(1, 2, 0)
        velocity = parts["transformer_3b"](
            vid=latents.reshape(-1, latents.shape[-1]),
            txt=text,
            vid_shape=torch.tensor([[1, *latents.shape[:2]]]),
            txt_shape=torch.tensor([[len(text)]]),
            timestep=torch.tensor([1000.0]),
        ).vid_sample.reshape(*latents.shape[:2], -1)
        clean = noise - velocity.permute(2, 0, 1)[None]
        decoded = parts["autoencoder"].decode(clean[:, :, None] / factor).sample[..., :height, :width]
        result = functions.lab_color_transfer(decoded.clone(), small.clone(), log)
        tensors |= {f"{name}.pixels": pixels.permute(1, 2, 0), f"{name}.noise": noise[0].permute(1, 2, 0).half()}
        for what, value in {"condition": condition, "clean": clean, "decoded": decoded, "result": result}.items():
            tensors[f"{name}.{what}"] = value.reshape(value.shape[1], *value.shape[-2:]).permute(1, 2, 0)
    return tensors, {}


# ---- names at full size


def write_names() -> None:
    """What the published files hold: for each name its shape and, where blocks have it, which blocks."""
    configs = json.loads(CONFIGS.read_text(encoding="utf-8"))
    names = {}
    for entry in ("SeedVR2-3B/transformer", "SeedVR2-7B/transformer", "SeedVR2/vae"):
        config = {key: value for key, value in configs[entry].items() if not key.startswith("_")}
        with torch.device("meta"):
            model = (autoencoder if entry.endswith("vae") else transformer)(config)
        assert sum(value.numel() for value in model.parameters()) == configs[entry]["_parameters"]
        found: dict[str, list] = {}
        for name, value in model.state_dict().items():
            block = re.match(r"blocks\.(\d+)\.", name)
            kind = [re.sub(r"^blocks\.\d+\.", "blocks.*.", name), list(value.shape)]
            found.setdefault(json.dumps(kind), []).append(int(block[1]) if block else None)
        names[entry] = []
        for kind, blocks in found.items():
            name, shape = json.loads(kind)
            where = [] if blocks == [None] else [blocks[0], blocks[-1]]
            assert not where or blocks == list(range(blocks[0], blocks[-1] + 1)), (name, blocks)
            names[entry].append([name, shape, *where])
    lines = ",\n".join(
        f"{json.dumps(entry)}: [\n" + ",\n".join(map(json.dumps, rows)) + "\n]" for entry, rows in names.items()
    )
    path = FOLDER / "names.json"
    path.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size:,} bytes")


# ---- the constant text


def embedding(checkout: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Writes the package's file, in float16; of the published bfloat16 one the tests keep a checksum and some rows."""
    published = torch.load(checkout / "pos_emb.pt", weights_only=True)
    assert published.shape == (58, 5120)
    stored = published.half()
    assert torch.equal(stored.to(published.dtype), published), "float16 holds every value"
    source = "ByteDance SeedVR2, pos_emb.pt; Apache-2.0"
    save_file({"embedding": stored.contiguous()}, EMBEDDING, {"source": source})
    digest = hashlib.sha256(published.float().contiguous().numpy().tobytes()).hexdigest()
    return {"rows": published[[0, 13, 57], :64].float()}, {"float32 sha256": digest}


MAKERS = {
    **{name: transformer_data(name) for name in TRANSFORMERS},
    **{name: autoencoder_data(name) for name in AUTOENCODERS},
    "colours": colours,
    "embedding": embedding,
    "whole": whole,
}

if __name__ == "__main__":
    main()

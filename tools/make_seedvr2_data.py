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
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "data" / "seedvr2"


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


def colours(_: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Pictures (H, W, 3) in about [-1, 1]: `content` takes the colours of `style`."""
    # All that is taken of torchvision is two names that nothing here calls; it comes in last, since others look for it.
    import diffusers.models.autoencoders.vae  # noqa: F401

    stand_in = types.ModuleType("torchvision.transforms")
    stand_in.ToTensor = stand_in.ToPILImage = None
    sys.modules.setdefault("torchvision", types.ModuleType("torchvision"))
    sys.modules.setdefault("torchvision.transforms", stand_in)
    from src.utils.color_fix import lab_color_transfer, wavelet_reconstruction

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
        wavelet = wavelet_reconstruction(content.clone(), style.clone())
        lab = lab_color_transfer(content.clone(), style.clone(), log)
        ties = wavelet[0].flatten(1).unique(dim=1).shape[1] < height * width
        assert not ties, "pixels of one colour have no order, so which of them gets which rank says nothing"
        for what, value in {"content": content, "style": style}.items():
            tensors[f"{name}.{what}"] = value[0].permute(1, 2, 0).half()
        for what, value in {"wavelet": wavelet, "lab": lab}.items():
            tensors[f"{name}.{what}"] = value[0].permute(1, 2, 0)[::every, ::every]
    return tensors, {"large": "of wavelet and lab every fourth row and column"}


MAKERS = {"colours": colours}

if __name__ == "__main__":
    main()

"""Groups of options that commands share, in the order in which --help shows them."""

from __future__ import annotations

import argparse
from pathlib import Path

from mflux.models.common.lora.styles import STYLES
from mflux.utils import values
from mflux.utils.values import Real, Whole


def add_model_options(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        "-m",
        required=required,
        help="a model's name, a Hugging Face repository (org/name), a folder, or a file",
    )
    group.add_argument(
        "--base-model", help="the model it derives from, when the repository's or folder's name does not tell"
    )
    group.add_argument(
        "--quantize", "-q", type=int, choices=values.QUANTIZE_CHOICES, help="bits per weight to quantize to"
    )


def add_part_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("parts of the model")
    group.add_argument(
        "--text-encoder",
        dest="text_encoder_paths",
        action="append",
        metavar="PATH",
        help="a text encoder instead of the model's own: a file (safetensors, GGUF), a folder or org/name; repeatable",
    )
    group.add_argument("--vae", dest="vae_path", metavar="PATH", help="an autoencoder instead of the model's own")


def add_lora_options(parser: argparse.ArgumentParser, *, style: bool = True, bake: bool = True) -> None:
    group = parser.add_argument_group("LoRA")
    group.add_argument(
        "--lora",
        nargs="+",
        action="append",
        metavar=("PATH", "SCALE"),
        help="a LoRA and its scale (1); a file, a name from LORA_LIBRARY_PATH, org/name, or org/name:file; repeatable",
    )
    if style:
        group.add_argument("--lora-style", choices=sorted(STYLES), help="an In-Context LoRA by the name of its style")
    group.add_argument("--lora-paths", nargs="*", help="LoRAs without scales; --lora says both at once")
    group.add_argument(
        "--lora-scales", nargs="*", type=Real(), help="one scale for each of --lora-paths", metavar="SCALE"
    )
    group.add_argument(
        "--bake-lora",
        action=argparse.BooleanOptionalAction,
        default=bake,
        help="add LoRAs to the weights once, instead of computing them in each step "
        + ("(default: yes)" if bake else "(default: no, so that requests change LoRAs without reading the weights)"),
    )


def add_prompt_options(parser: argparse.ArgumentParser, *, cached: bool = False) -> None:
    group = parser.add_argument_group("prompt")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--prompt", help="what to draw; - reads it from standard input")
    either.add_argument("--prompt-file", type=Path, help="a text file with the prompt, read anew for each picture")
    group.add_argument("--negative-prompt", default="", help="what not to draw, for models that can use it")
    if cached:
        group.add_argument(
            "--prompt-cache",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="keep encoded prompts on disk, for this user alone: the next command with the same prompt reads no "
            "text encoder (default: yes, unless MFLUX_PROMPT_CACHE=0)",
        )


def add_generation_options(
    parser: argparse.ArgumentParser, *, default_size: str, guidance: str, scheduler: str = "linear"
) -> None:
    group = parser.add_argument_group("picture")
    group.add_argument(
        "--seed", type=values.seed, nargs="+", help="one picture for each seed (default: one, from the clock)"
    )
    group.add_argument(
        "--auto-seeds", type=Whole(most=10**6), default=-1, metavar="N", help="N pictures with random seeds"
    )
    group.add_argument(
        "--width",
        type=values.dimension,
        default="auto",
        help=f"pixels, 2x of the source picture, or auto ({default_size})",
    )
    group.add_argument("--height", type=values.dimension, default="auto", help="likewise")
    group.add_argument("--steps", type=values.steps, help="denoising steps (default: the model's)")
    group.add_argument(
        "--guidance",
        type=values.guidance,
        help=f"how closely to follow the prompt (default: {guidance})",
    )
    group.add_argument(
        "--step-cache-ratio",
        "--step-cache",
        "--teacache-ratio",
        type=values.some_of_them,
        metavar="PART",
        help="of 10 steps and more, use the one before again in this part of the predictions (default: none)",
    )
    group.add_argument(
        "--cfg-end",
        type=values.part_of_them,
        metavar="PART",
        help="guide in this part of the steps, and spare the others their second pass (default: all)",
    )
    group.add_argument(
        "--scheduler", default=scheduler, help="linear, flow_match_euler_discrete, or your own package.module.Class"
    )


def add_image_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("picture to start from")
    group.add_argument(
        "--image",
        nargs="+",
        metavar=("PATH", "STRENGTH"),
        help="a picture, and how much of it to keep, from 0 to 1 (default: 0.4)",
    )
    group.add_argument("--image-path", type=Path, help="the picture alone; --image says both at once")
    group.add_argument("--image-strength", type=values.strength, default=0.4, help="the strength alone")


def add_compute_precision_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--compute-precision",
        choices=["float16", "bfloat16"],
        help="what attention and feed-forwards compute in (default: as the weights are stored; float16 on M1 and M2, "
        "which are slow with bfloat16, unless its range is too small for the model)",
    )


def add_vae_precision_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--vae-full-precision",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="run the autoencoder in float32 and on the whole picture at once; takes more memory",
    )


def add_pid_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("PiD decoder")
    group.add_argument(
        "--pid-decode", action=argparse.BooleanOptionalAction, default=False, help="decode with PiD; not built yet"
    )
    group.add_argument(
        "--pid-degrade-sigma", type=float, default=0.0, help="noise to add before PiD decodes; not built yet"
    )


def add_output_options(parser: argparse.ArgumentParser, *, settings: bool = True) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        default="image.png",
        help="where to write; {seed} stands for the seed (default: image.png; an existing file is never replaced)",
    )
    group.add_argument(
        "--metadata", "--make-conf", action="store_true", help="also write the settings as NAME.metadata.json"
    )
    group.add_argument(
        "--no-metadata", "--no-exif", action="store_true", help="do not write the settings into the picture"
    )
    if settings:
        group.add_argument(
            "--config-from-metadata",
            "--config-from-conf",
            "-C",
            type=Path,
            metavar="FILE",
            help="take the settings of a .metadata.json or a picture; options given here come before them",
        )
    group.add_argument(
        "--stepwise-image-output-dir",
        metavar="DIR",
        help="write a picture of each step, and a strip of them all, to this folder",
    )


def add_server_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("server").add_argument(
        "--server",
        metavar="URL",
        help="have a running mflux serve do it, as http://127.0.0.1:7860 (default: MFLUX_SERVER; MFLUX_API_KEY is the "
        "key that it wants)",
    )


def add_processes_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("more machines").add_argument(
        "--divide-transformer",
        action="store_true",
        help="under mlx.launch: each process has a part of the transformer, and all generate each image together "
        "(FLUX.1, Qwen-Image)",
    )


def add_device_option(parser: argparse._ActionsContainer) -> None:
    """`MfluxParser.parse` does what it says."""
    parser.add_argument(
        "--device",
        choices=values.DEVICES,
        help="what computes (default: $MFLUX_DEVICE, else the GPU where there is one)",
    )


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    add_device_option(group)
    group.add_argument("--low-ram", action="store_true", help="use as little memory as possible; slower")
    group.add_argument(
        "--mlx-cache-limit-gb", type=Real(above=0), metavar="GB", help="how much freed memory MLX may keep"
    )
    group.add_argument("--vae-tiling", action="store_true", help="decode in overlapping tiles")
    group.add_argument(
        "--vae-tile-size",
        type=values.tile_size,
        metavar="PIXELS",
        help="of a tile (default: 512); implies --vae-tiling",
    )
    group.add_argument(
        "--battery-percentage-stop-limit",
        "-B",
        type=values.battery_limit,
        default=5,
        metavar="PERCENT",
        help="on a Mac's battery, stop at this charge (default: 5)",
    )

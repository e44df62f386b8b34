"""Every command: its module, and one line about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A module with `main(argv)` and `build_parser()`."""

    module: str
    summary: str


# By the name after "mflux-"; the console scripts in pyproject.toml are the same.
COMMANDS = {
    "generate": Command("mflux.models.flux.cli.flux_generate", "draw with FLUX.1"),
    "save": Command("mflux.models.common.cli.save", "save a model, quantized or not, to a folder"),
    "convert": Command("mflux.cli.convert", "turn PyTorch weights into safetensors"),
    "save-depth": Command("mflux.models.depth_pro.cli.save_depth", "estimate a photo's depth with Depth Pro"),
    "inspire-fibo": Command("mflux.models.fibo_vlm.cli.fibo_inspire", "turn a picture into a prompt for FIBO"),
    "refine-fibo": Command("mflux.models.fibo_vlm.cli.fibo_refine", "change a prompt for FIBO as you say"),
    "lora-library": Command("mflux.models.common.cli.lora_library", "list the LoRAs in LORA_LIBRARY_PATH"),
    "info": Command("mflux.cli.info", "show the settings that a picture carries"),
    "doctor": Command("mflux.cli.doctor", "show what this installation is made of, and how to mend it"),
    "completions": Command("mflux.cli.completions", "install tab completion for the shell"),
}

# Commands of mflux 0.24 that this version does not have, so that they can be refused by name.
NOT_BUILT = (
    "capabilities", "check", "concept", "concept-from-image", "generate-anima", "generate-boogu",
    "generate-controlnet", "generate-depth", "generate-ernie-image", "generate-ernie-image-turbo", "generate-fibo",
    "generate-fibo-edit", "generate-fibo2", "generate-fibo2-edit", "generate-fill", "generate-flux2",
    "generate-flux2-edit", "generate-flux3", "generate-flux3-edit", "generate-ideogram4", "generate-in-context",
    "generate-in-context-catvton", "generate-in-context-edit", "generate-iris", "generate-kontext", "generate-krea2",
    "generate-krea2-controlnet", "generate-lens", "generate-ming", "generate-moss-image", "generate-qwen",
    "generate-qwen-2.1", "generate-qwen-2.1-controlnet", "generate-qwen-2.1-edit", "generate-qwen-edit",
    "generate-redux", "generate-z-image", "generate-z-image-controlnet", "generate-z-image-turbo",
    "train", "upscale-controlnet", "upscale-seedvr2",
)  # fmt: skip

"""Every command: those of the families, and those that belong to none."""

from __future__ import annotations

from mflux.models.common.family import Command, families

# By the name after "mflux-"; the console scripts in pyproject.toml are the same.
_OF_NO_FAMILY = (
    Command("serve", "mflux.cli.serve", "keep models loaded, and generate over HTTP, with a page"),
    Command("train", "mflux.models.common.cli.train", "train a LoRA on images and captions"),
    Command("save", "mflux.cli.save", "save a model, quantized or not, to a folder"),
    Command("convert", "mflux.cli.convert", "turn PyTorch weights into safetensors"),
    Command("lora-library", "mflux.models.common.cli.lora_library", "list the LoRAs in LORA_LIBRARY_PATH"),
    Command("info", "mflux.cli.info", "show the settings that a picture carries"),
    Command("check", "mflux.cli.check", "find out whether a model is whole, offline"),
    Command("doctor", "mflux.cli.doctor", "show what this installation is made of, and how to mend it"),
    Command("capabilities", "mflux.cli.capabilities", "show every command's options, for programs"),
    Command("completions", "mflux.cli.completions", "install tab completion for the shell"),
)
COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (*(command for family in families().values() for command in family.commands), *_OF_NO_FAMILY)
}

_OF_024 = (
    "capabilities", "check", "completions", "concept", "concept-from-image", "generate", "generate-anima",
    "generate-boogu", "generate-controlnet", "generate-depth", "generate-ernie-image", "generate-ernie-image-turbo",
    "generate-fibo", "generate-fibo-edit", "generate-fibo2", "generate-fibo2-edit", "generate-fill", "generate-flux2",
    "generate-flux2-edit", "generate-flux3", "generate-flux3-edit", "generate-ideogram4", "generate-in-context",
    "generate-in-context-catvton", "generate-in-context-edit", "generate-iris", "generate-kontext", "generate-krea2",
    "generate-krea2-controlnet", "generate-lens", "generate-ming", "generate-moss-image", "generate-qwen",
    "generate-qwen-2.1", "generate-qwen-2.1-controlnet", "generate-qwen-2.1-edit", "generate-qwen-edit",
    "generate-redux", "generate-z-image", "generate-z-image-controlnet", "generate-z-image-turbo", "info",
    "inspire-fibo", "lora-library", "refine-fibo", "save", "save-depth", "train", "upscale-controlnet",
    "upscale-seedvr2",
)  # fmt: skip
# Commands of mflux 0.24 that this version does not have, so that they can be refused by name.
NOT_BUILT = tuple(name for name in _OF_024 if name not in COMMANDS)

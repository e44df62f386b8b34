"""In-Context LoRAs by the names of their styles: what `--lora-style` takes, in most commands of mflux 0.24."""

# Alibaba's In-Context LoRAs for FLUX.1-dev, by the names of their styles.
STYLE_REPOSITORY = "ali-vilab/In-Context-LoRA"
STYLES = {
    "couple": "couple-profile.safetensors",
    "font": "font-design.safetensors",
    "home": "home-decoration.safetensors",
    "identity": "visual-identity-design.safetensors",
    "illustration": "portrait-illustration.safetensors",
    "portrait": "portrait-photography.safetensors",
    "ppt": "ppt-templates.safetensors",
    "sandstorm": "sandstorm-visual-effect.safetensors",
    "sparklers": "sparklers-visual-effect.safetensors",
    "storyboard": "film-storyboard.safetensors",
}


def style_path(style: str) -> str:
    """The LoRA of a style, as `find_lora` takes it."""
    return f"{STYLE_REPOSITORY}:{STYLES[style]}"

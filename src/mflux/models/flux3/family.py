"""FLUX.3 image klein as data: its components, commands and models."""

from mflux.models.common.family import Command, Component, Family

_MODELS = ("flux3-image-klein", "flux3-image-klein-base")
_VARIANTS = "mflux.models.flux3.variants"
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip

FAMILY = Family(
    title="FLUX.3",
    published={"flux3-image-klein-base": {"transformer": {"flow_map": False}}},
    components=(
        Component(
            "text_encoder",
            "mflux.models.flux3.model.text_encoder:Flux3TextEncoder",
            "text_encoder",
            stage="encode",
        ),
        Component(
            "transformer",
            "mflux.models.flux3.model.transformer:Flux3Transformer",
            "transformer",
            published_class="Flux3Transformer2DModel",
            lora=True,
        ),
        Component(
            "vae",
            "mflux.models.common.networks.autoencoders.flux2:AutoencoderKLFlux2",
            "vae",
            stage="decode",
            published_class="AutoencoderKLFlux2",
        ),
    ),
    commands=(
        Command(
            "generate-flux3",
            "mflux.models.flux3.cli.flux3_generate",
            "generate with FLUX.3 image klein",
            models=_MODELS,
            pipeline=f"{_VARIANTS}.txt2img.flux3_klein:Flux3Klein",
        ),
        Command(
            "generate-flux3-edit",
            "mflux.models.flux3.cli.flux3_edit_generate",
            "edit images with FLUX.3 image klein",
            models=_MODELS,
            pipeline=f"{_VARIANTS}.edit.flux3_klein_edit:Flux3KleinEdit",
        ),
    ),
    # There is no folder for the schedule, and the tokenizer lies with the text encoder.
    beside=("modular_model_index.json", *(f"text_encoder/{file}" for file in _TOKENIZER)),
    lora="mflux.models.flux3.lora_names:LORA",
    layout="mflux.models.flux3.layouts:LAYOUT",
    float16=True,
)

"""FLUX.2 klein as data: its components, commands and models."""

from mflux.models.common.family import Command, Component, Family, Trained
from mflux.utils.settings import Setting
from mflux.utils.values import Switch

_MODELS = (
    "flux2-klein-4b", "flux2-klein-9b", "flux2-klein-9b-kv", "flux2-klein-base-4b", "flux2-klein-base-9b",
)  # fmt: skip

_9B = {
    "text_encoder": {"hidden_size": 4096, "intermediate_size": 12288},
    "transformer": {
        "num_attention_heads": 32, "num_layers": 8, "num_single_layers": 24, "joint_attention_dim": 12288,
    },
}  # fmt: skip

_TRAINING = "mflux.models.flux2.training_adapter.flux2_training_adapter"

FAMILY = Family(
    title="FLUX.2",
    published={name: _9B for name in _MODELS if "9b" in name},
    components=(
        Component(
            "text_encoder",
            "mflux.models.flux2.model.text_encoder:KleinTextEncoder",
            "text_encoder",
            stage="encode",
        ),
        Component(
            "transformer",
            "mflux.models.flux2.model.transformer:Flux2Transformer",
            "transformer",
            published_class="Flux2Transformer2DModel",
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
            "generate-flux2",
            "mflux.models.flux2.cli.flux2_generate",
            "draw with FLUX.2 klein",
            models=_MODELS,
            pipeline="mflux.models.flux2.variants.txt2img.flux2_klein:Flux2Klein",
        ),
        Command(
            "generate-flux2-edit",
            "mflux.models.flux2.cli.flux2_edit_generate",
            "edit pictures with FLUX.2 klein",
            models=_MODELS,
            pipeline="mflux.models.flux2.variants.edit.flux2_klein_edit:Flux2KleinEdit",
        ),
    ),
    settings=(
        Setting(
            "small_text_encoder",
            "Small text encoder",
            kind=Switch(),
            option="--small-text-encoder",
            after="vae_full_precision",
        ),
        Setting("small_decoder", "Small decoder", kind=Switch(), option="--small-decoder", after="small_text_encoder"),
    ),
    lora="mflux.models.flux2.lora_names:LORA",
    layout="mflux.models.flux2.layouts:LAYOUT",
    training=(
        Trained(_MODELS, "generate-flux2", f"{_TRAINING}:Flux2TrainingAdapter"),
        Trained(
            ("flux2-klein-base-4b", "flux2-klein-base-9b"),
            "generate-flux2-edit",
            f"{_TRAINING}:Flux2EditTrainingAdapter",
            pairs=True,
        ),
    ),
    float16=True,
)

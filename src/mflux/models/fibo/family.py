"""FIBO as data: its components, commands and models."""

from mflux.models.common.family import Command, Component, Family, Trained

FAMILY = Family(
    title="FIBO",
    components=(
        Component(
            "text_encoder",
            "mflux.models.common.networks.text_encoders.smollm3:SmolLM3TextEncoder",
            "text_encoder",
            stage="encode",
        ),
        Component(
            "transformer",
            "mflux.models.fibo.model.transformer:FiboTransformer",
            "transformer",
            published_class="BriaFiboTransformer2DModel",
            lora=True,
        ),
        Component(
            "vae",
            "mflux.models.fibo.model.autoencoder:FiboAutoencoder",
            "vae",
            stage="decode",
            published_class="AutoencoderKLWan",
        ),
    ),
    commands=(
        Command(
            "generate-fibo",
            "mflux.models.fibo.cli.fibo_generate",
            "draw with FIBO",
            models=("fibo", "fibo-lite"),
            pipeline="mflux.models.fibo.variants.txt2img.fibo:FIBO",
        ),
        Command(
            "generate-fibo-edit",
            "mflux.models.fibo.cli.fibo_edit",
            "edit a picture, or cut out what is in it, with FIBO-Edit",
            models=("fibo-edit", "fibo-edit-rmbg"),
            pipeline="mflux.models.fibo.variants.edit.fibo_edit:FIBOEdit",
        ),
        Command("inspire-fibo", "mflux.models.fibo.cli.fibo_inspire", "turn a picture into a prompt for FIBO"),
        Command("refine-fibo", "mflux.models.fibo.cli.fibo_refine", "change a prompt for FIBO as you say"),
    ),
    lora="mflux.models.fibo.lora_names:LORA",
    layout="mflux.models.fibo.layouts:LAYOUT",
    single=(("FIBO-VLM", "mflux.models.fibo.vlm.weights:check"),),
    training=(
        Trained(
            ("fibo", "fibo-lite"),
            "generate-fibo",
            "mflux.models.fibo.training_adapter.fibo_training_adapter:FiboTrainingAdapter",
            continuous=True,
        ),
    ),
    float16=True,
)

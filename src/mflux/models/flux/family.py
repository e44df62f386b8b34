"""FLUX.1 as data: its components, commands and models."""

from mflux.models.common.family import Command, Component, Family, Trained

_TEXT_ENCODERS = "mflux.models.common.networks.text_encoders"
_VARIANTS = "mflux.models.flux.variants"
_CONTROLNET = f"{_VARIANTS}.controlnet.flux_controlnet:Flux1Controlnet"
_IN_CONTEXT_FILL = f"{_VARIANTS}.in_context.flux_in_context_fill:Flux1InContextFill"
_TEXT_TO_IMAGE_MODELS = ("demo", "schnell", "dev", "krea-dev")
_CLI = "mflux.models.flux.cli"

# What a variant has besides; it lies in the model's folder where mflux saved it, and else in a repository of its own.
CONTROLNET = Component(
    "transformer_controlnet",
    "mflux.models.flux.model.controlnet:FluxControlNet",
    "transformer_controlnet",
    published_class="FluxControlNetModel",
    repository="controlnet_model",
    at_root=True,
)

IMAGE_ENCODER = Component(
    "image_encoder",
    "mflux.models.flux.model.redux:SiglipVision",
    "image_encoder",
    stage="encode",
    repository="black-forest-labs/FLUX.1-Redux-dev",
    beside=("feature_extractor",),
)
IMAGE_EMBEDDER = Component(
    "image_embedder",
    "mflux.models.flux.model.redux:ReduxEmbedder",
    "image_embedder",
    stage="encode",
    published_class="ReduxImageEncoder",
    repository="black-forest-labs/FLUX.1-Redux-dev",
)

_TRAINING = "mflux.models.flux.training_adapter.flux_training_adapter:FluxTrainingAdapter"
_FILL = {"in_channels": 384, "out_channels": 64}

FAMILY = Family(
    title="FLUX.1",
    components=(
        Component(
            "clip_text_encoder",
            f"{_TEXT_ENCODERS}.clip:CLIPTextEncoder",
            "text_encoder",
            stage="encode",
            lora=True,
        ),
        Component("t5_text_encoder", f"{_TEXT_ENCODERS}.t5:T5Encoder", "text_encoder_2", stage="encode"),
        Component(
            "transformer",
            "mflux.models.flux.model.transformer:FluxTransformer",
            "transformer",
            published_class="FluxTransformer2DModel",
            lora=True,
        ),
        Component(
            "vae",
            "mflux.models.common.networks.autoencoders.kl:AutoencoderKL",
            "vae",
            stage="decode",
            published_class="AutoencoderKL",
        ),
    ),
    commands=(
        Command(
            "generate",
            f"{_CLI}.flux_generate",
            "draw with FLUX.1",
            models=_TEXT_TO_IMAGE_MODELS,
            pipeline=f"{_VARIANTS}.txt2img.flux:Flux1",
        ),
        Command(
            "generate-kontext",
            f"{_CLI}.flux_generate_kontext",
            "edit a picture with FLUX.1 Kontext",
            models=("dev-kontext",),
            pipeline=f"{_VARIANTS}.kontext.flux_kontext:Flux1Kontext",
        ),
        Command(
            "generate-fill",
            f"{_CLI}.flux_generate_fill",
            "paint anew what is masked in a picture with FLUX.1 Fill",
            models=("dev-fill",),
            pipeline=f"{_VARIANTS}.fill.flux_fill:Flux1Fill",
        ),
        Command(
            "generate-in-context-edit",
            f"{_CLI}.flux_generate_in_context_edit",
            "edit a picture with FLUX.1 Fill and IC-Edit's LoRA",
            models=("dev-fill",),
            pipeline=_IN_CONTEXT_FILL,
        ),
        Command(
            "generate-in-context-catvton",
            f"{_CLI}.flux_generate_in_context_catvton",
            "show a person wearing a garment with CatVTON-FLUX",
            models=("dev-fill-catvton",),
            pipeline=_IN_CONTEXT_FILL,
        ),
        Command(
            "generate-depth",
            f"{_CLI}.flux_generate_depth",
            "draw a picture of a given depth with FLUX.1 Depth",
            models=("dev-depth",),
            pipeline=f"{_VARIANTS}.depth.flux_depth:Flux1Depth",
        ),
        Command(
            "generate-controlnet",
            f"{_CLI}.flux_generate_controlnet",
            "draw a picture with the edges of another one",
            models=("dev-controlnet-canny", "schnell-controlnet-canny"),
            pipeline=_CONTROLNET,
        ),
        Command(
            "generate-redux",
            f"{_CLI}.flux_generate_redux",
            "draw after other pictures with FLUX.1 Redux",
            models=("dev-redux",),
            pipeline=f"{_VARIANTS}.redux.flux_redux:Flux1Redux",
        ),
        Command(
            "generate-in-context",
            f"{_CLI}.flux_generate_in_context_dev",
            "draw a picture in the manner of another one",
            models=("dev",),
            pipeline=f"{_VARIANTS}.in_context.flux_in_context_dev:Flux1InContextDev",
        ),
        Command(
            "concept",
            f"{_CLI}.flux_concept",
            "draw with FLUX.1, and show where a concept is",
            models=_TEXT_TO_IMAGE_MODELS,
            pipeline=f"{_VARIANTS}.concept_attention.flux_concept:Flux1Concept",
        ),
        Command(
            "concept-from-image",
            f"{_CLI}.flux_concept_from_image",
            "show where a concept is in a picture",
            models=_TEXT_TO_IMAGE_MODELS,
            pipeline=f"{_VARIANTS}.concept_attention.flux_concept_from_image:Flux1ConceptFromImage",
        ),
        Command(
            "upscale-controlnet",
            f"{_CLI}.flux_upscale",
            "draw a picture anew with more pixels",
            models=("dev-controlnet-upscaler",),
            pipeline=_CONTROLNET,
        ),
    ),
    beside=("model_index.json", "scheduler", "tokenizer", "tokenizer_2"),
    lora="mflux.models.flux.lora_names:LORA",
    layout="mflux.models.flux.layouts:LAYOUT",
    published={
        "schnell": {"transformer": {"guidance_embeds": False}},
        "schnell-controlnet-canny": {"transformer": {"guidance_embeds": False}},
        "dev-fill": {"transformer": _FILL},
        "dev-fill-catvton": {"transformer": _FILL},
        "dev-depth": {"transformer": {"in_channels": 128, "out_channels": 64}},
    },
    training=(
        # The embedded model learns best at the noise levels that it generates with.
        Trained(("demo",), "generate", _TRAINING),
        Trained(("schnell", "dev", "krea-dev"), "generate", _TRAINING, continuous=True),
    ),
    float16=True,
)

"""Which names in LoRA files mean which layers of FLUX.1: tables, no code.

The layers' own names are diffusers'. Black Forest Labs' names are those of the single-file checkpoints, and most tools
train on these; there one matrix holds what are several layers here, one below the other.
"""

from __future__ import annotations

from mflux.models.common.lora.black_forest_labs import DOUBLE, LAYERS, SINGLE, SWAPPED
from mflux.models.common.lora.names import LoraNames, Spelling

_EMBED = "time_text_embed"

BLACK_FOREST_LABS = LAYERS | {
    "time_in.in_layer": (f"{_EMBED}.timestep_embedder.linear_1",),
    "time_in.out_layer": (f"{_EMBED}.timestep_embedder.linear_2",),
    "vector_in.in_layer": (f"{_EMBED}.text_embedder.linear_1",),
    "vector_in.out_layer": (f"{_EMBED}.text_embedder.linear_2",),
    "guidance_in.in_layer": (f"{_EMBED}.guidance_embedder.linear_1",),
    "guidance_in.out_layer": (f"{_EMBED}.guidance_embedder.linear_2",),
    "double_blocks.{i}.img_mod.lin": (f"{DOUBLE}.norm1.linear",),
    "double_blocks.{i}.txt_mod.lin": (f"{DOUBLE}.norm1_context.linear",),
    "double_blocks.{i}.img_mlp.0": (f"{DOUBLE}.ff.net.0.proj",),
    "double_blocks.{i}.img_mlp.2": (f"{DOUBLE}.ff.net.2",),
    "double_blocks.{i}.txt_mlp.0": (f"{DOUBLE}.ff_context.net.0.proj",),
    "double_blocks.{i}.txt_mlp.2": (f"{DOUBLE}.ff_context.net.2",),
    "single_blocks.{i}.modulation.lin": (f"{SINGLE}.norm.linear",),
    "single_blocks.{i}.linear1": (
        f"{SINGLE}.attn.to_q",
        f"{SINGLE}.attn.to_k",
        f"{SINGLE}.attn.to_v",
        f"{SINGLE}.proj_mlp",
    ),
    "single_blocks.{i}.linear2": (f"{SINGLE}.proj_out",),
}

XLABS = {
    "double_blocks.{i}.processor.qkv_lora1": BLACK_FOREST_LABS["double_blocks.{i}.img_attn.qkv"],
    "double_blocks.{i}.processor.qkv_lora2": BLACK_FOREST_LABS["double_blocks.{i}.txt_attn.qkv"],
    "double_blocks.{i}.processor.proj_lora1": (f"{DOUBLE}.attn.to_out.0",),
    "double_blocks.{i}.processor.proj_lora2": (f"{DOUBLE}.attn.to_add_out",),
    # Of linear1 only what belongs to the attention.
    "single_blocks.{i}.processor.qkv_lora": BLACK_FOREST_LABS["single_blocks.{i}.linear1"][:3],
    "single_blocks.{i}.processor.proj_lora": (f"{SINGLE}.proj_out",),
}

# The feed-forward layers as mflux up to 0.24 names them in what it trains.
MFLUX = {
    f"{DOUBLE}.ff.linear1": (f"{DOUBLE}.ff.net.0.proj",),
    f"{DOUBLE}.ff.linear2": (f"{DOUBLE}.ff.net.2",),
    f"{DOUBLE}.ff_context.linear1": (f"{DOUBLE}.ff_context.net.0.proj",),
    f"{DOUBLE}.ff_context.linear2": (f"{DOUBLE}.ff_context.net.2",),
}

# The text encoder that diffusers lets a LoRA change is CLIP; parts for T5 are reported and left out.
_SPELLINGS = (
    Spelling("transformer"),
    Spelling("transformer", joint="_"),
    Spelling("transformer", table=MFLUX),
    Spelling("transformer", table=MFLUX, joint="_"),
    Spelling("transformer", table=BLACK_FOREST_LABS, swapped=SWAPPED),
    Spelling("transformer", table=BLACK_FOREST_LABS, joint="_", swapped=SWAPPED),
    Spelling("transformer", table=XLABS),
    Spelling("text_encoder", ("text_encoder.", "text_encoders.clip_l.transformer.")),
    Spelling("text_encoder", ("lora_te1_", "lora_te_"), joint="_"),
)

# One name of each layout, for the sentence that says which there are.
_LAYOUTS = {
    "PEFT and diffusers": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    "kohya": "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    "Black Forest Labs and ComfyUI": "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
    "XLabs": "double_blocks.0.processor.qkv_lora1.down.weight",
    "LyCORIS LoKr": "lycoris_transformer_blocks_0_attn_to_q.lokr_w1",
}

LORA = LoraNames(_SPELLINGS, _LAYOUTS, BLACK_FOREST_LABS, SWAPPED, heights={"proj_mlp": 4})

"""Which names in LoRA files mean which layers of FLUX.2: tables, no code.

The layers' own names are diffusers'. Black Forest Labs' names are those of the single-file checkpoints, which
`layouts.py` reads by the same table.
"""

from __future__ import annotations

from mflux.models.common.lora.black_forest_labs import DOUBLE, LAYERS, SINGLE, SWAPPED
from mflux.models.common.lora.names import LoraNames, Spelling

_TIME = "time_guidance_embed.timestep_embedder"

BLACK_FOREST_LABS = LAYERS | {
    "time_in.in_layer": (f"{_TIME}.linear_1",),
    "time_in.out_layer": (f"{_TIME}.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "double_blocks.{i}.img_mlp.0": (f"{DOUBLE}.ff.linear_in",),
    "double_blocks.{i}.img_mlp.2": (f"{DOUBLE}.ff.linear_out",),
    "double_blocks.{i}.txt_mlp.0": (f"{DOUBLE}.ff_context.linear_in",),
    "double_blocks.{i}.txt_mlp.2": (f"{DOUBLE}.ff_context.linear_out",),
    "single_blocks.{i}.linear1": (f"{SINGLE}.attn.to_qkv_mlp_proj",),
    "single_blocks.{i}.linear2": (f"{SINGLE}.attn.to_out",),
}

# As mflux up to 0.24 calls them.
MFLUX = {
    f"{DOUBLE}.attn.to_out": (f"{DOUBLE}.attn.to_out.0",),
    "time_guidance_embed.linear_1": (f"{_TIME}.linear_1",),
    "time_guidance_embed.linear_2": (f"{_TIME}.linear_2",),
}

# Some exports cut the first letters of one name off.
CUT = {f"sformer_blocks.{{i}}.{layer}": (f"{DOUBLE}.{layer}",) for layer in (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out",
)}  # fmt: skip

_SPELLINGS = (
    Spelling("transformer"),
    Spelling("transformer", joint="_"),
    Spelling("transformer", table=BLACK_FOREST_LABS, swapped=SWAPPED),
    Spelling("transformer", table=BLACK_FOREST_LABS, joint="_", swapped=SWAPPED),
    Spelling("transformer", table=MFLUX),
    Spelling("transformer", table=MFLUX, joint="_"),
    Spelling("transformer", table=CUT),
)

# One name of each layout, for the sentence that says which there are.
_LAYOUTS = {
    "PEFT and diffusers": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    "Black Forest Labs and ComfyUI": "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
    "kohya": "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    "LyCORIS LoKr": "lycoris_transformer_blocks_0_attn_to_q.lokr_w1",
}

LORA = LoraNames(_SPELLINGS, _LAYOUTS, BLACK_FOREST_LABS, SWAPPED)

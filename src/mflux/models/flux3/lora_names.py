"""Which names in LoRA files mean which layers of FLUX.3: tables, no code.

The layers' own names are diffusers'. Black Forest Labs' names are those of the single-file checkpoints, which
`layouts.py` reads by the same table.
"""

from __future__ import annotations

from mflux.models.common.lora.names import LoraNames, Spelling

# Theirs → diffusers', of the blocks of each kind.
BLOCKS = {
    "content_mode_blocks.image.{i}": "mode_blocks.image.{i}",
    "content_mode_blocks.image_cond.{i}": "mode_blocks.image_cond.{i}",
    "txt_mode_blocks.{i}": "txt_mode_blocks.{i}",
    "single_blocks.{i}": "single_transformer_blocks.{i}",
}
_LAYERS = {
    "q_proj": "attn.to_q", "k_proj": "attn.to_k", "v_proj": "attn.to_v", "attn_out": "attn.to_out.0",
    "mlp_in": "ff.linear_in", "mlp_out": "ff.linear_out",
}  # fmt: skip
BLACK_FOREST_LABS: dict[str, tuple[str, ...]] = {
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("timestep_embedder.linear_1",),
    "time_in.out_layer": ("timestep_embedder.linear_2",),
    "ref_time_in.in_layer": ("target_timestep_embedder.linear_1",),
    "ref_time_in.out_layer": ("target_timestep_embedder.linear_2",),
    "emb_in.image": ("x_embedders.image",),
    "emb_in.image_cond": ("x_embedders.image_cond",),
    "final_layer.image.linear": ("proj_out",),
    "final_layer.image.adaLN_modulation.1": ("norm_out.linear",),
    **{
        f"{stream}.{kind}.lin": (f"{stream}.{kind}.linear",)
        for stream in ("early_stream_modulations", "single_stream_modulations")
        for kind in ("image", "image_cond", "txt")
    },
    **{f"{theirs}.{name}": (f"{ours}.{layer}",) for theirs, ours in BLOCKS.items() for name, layer in _LAYERS.items()},
}
# Theirs has the shift first, diffusers' the scale.
SWAPPED = ("norm_out.linear",)

# As mflux up to 0.24 calls it.
MFLUX = {f"{block}.attn.to_out": (f"{block}.attn.to_out.0",) for block in BLOCKS.values()}

_SPELLINGS = (
    Spelling("transformer"),
    Spelling("transformer", joint="_"),
    Spelling("transformer", table=BLACK_FOREST_LABS, swapped=SWAPPED),
    Spelling("transformer", table=BLACK_FOREST_LABS, joint="_", swapped=SWAPPED),
    Spelling("transformer", table=MFLUX),
    Spelling("transformer", table=MFLUX, joint="_"),
)

# One name of each layout, for the sentence that says which there are.
_LAYOUTS = {
    "PEFT and diffusers": "transformer.mode_blocks.image.0.attn.to_q.lora_A.weight",
    "Black Forest Labs and ComfyUI": "diffusion_model.content_mode_blocks.image.0.q_proj.lora_A.weight",
    "kohya": "lora_unet_content_mode_blocks_image_0_q_proj.lora_down.weight",
    "LyCORIS LoKr": "lycoris_mode_blocks_image_0_attn_to_q.lokr_w1",
}

LORA = LoraNames(_SPELLINGS, _LAYOUTS)

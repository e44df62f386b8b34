"""Which names in files mean which layers of Krea 2: tables, no code.

The layers' own names are diffusers'. ComfyUI, and trainers that take the authors' own modules, write the authors'.
"""

from __future__ import annotations

from mflux.models.common.lora.names import LoraNames, Spelling

ORIGINAL: dict[str, tuple[str, ...]] = {
    "first": ("img_in",),
    "tmlp.0": ("time_embed.linear_1",),
    "tmlp.2": ("time_embed.linear_2",),
    "tproj.1": ("time_mod_proj",),
    "txtmlp.1": ("txt_in.linear_1",),
    "txtmlp.3": ("txt_in.linear_2",),
    "txtfusion.projector": ("text_fusion.projector",),
    "last.linear": ("final_layer.linear",),
}
NORMS: dict[str, tuple[str, ...]] = {"txtmlp.0": ("txt_in.norm",), "last.norm": ("final_layer.norm",)}
_ATTENTION = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0", "gate": "to_gate"}
for _theirs, _ours in (
    ("blocks", "transformer_blocks"),
    ("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks"),
    ("txtfusion.refiner_blocks", "text_fusion.refiner_blocks"),
):
    ORIGINAL |= {f"{_theirs}.{{i}}.attn.{name}": (f"{_ours}.{{i}}.attn.{own}",) for name, own in _ATTENTION.items()}
    ORIGINAL |= {f"{_theirs}.{{i}}.mlp.{name}": (f"{_ours}.{{i}}.ff.{name}",) for name in ("gate", "up", "down")}
    NORMS |= {
        f"{_theirs}.{{i}}.{name}": (f"{_ours}.{{i}}.{own}",)
        for name, own in (
            ("prenorm", "norm1"), ("postnorm", "norm2"), ("attn.qknorm.qnorm", "attn.norm_q"),
            ("attn.qknorm.knorm", "attn.norm_k"),
        )
    }  # fmt: skip

LORA = LoraNames(
    spellings=(
        Spelling("transformer"),
        Spelling("transformer", joint="_"),
        Spelling("transformer", table=ORIGINAL),
        Spelling("transformer", table=ORIGINAL, joint="_"),
    ),
    # One name of each layout, for the sentence that says which there are.
    layouts={
        "PEFT and diffusers": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "ComfyUI": "diffusion_model.blocks.0.attn.wq.lora_A.weight",
        "ai-toolkit": "base_model.model.blocks.0.attn.wq.lora_A.weight",
        "kohya": "lora_unet_blocks_0_attn_wq.lora_down.weight",
        "LyCORIS LoKr": "diffusion_model.blocks.0.attn.wq.lokr_w1",
    },
)

"""Which names in LoRA files mean which layers of Z-Image: tables, no code.

The layers' own names are diffusers'. ComfyUI, and trainers that take the authors' own modules, write the names of
single files, where queries, keys and values are one matrix.
"""

from __future__ import annotations

from mflux.models.common.lora.names import LoraNames, Spelling

_BLOCKS = ("layers", "noise_refiner", "context_refiner")
_FINAL = "all_final_layer.2-1"

ORIGINAL: dict[str, tuple[str, ...]] = {
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer.linear": (f"{_FINAL}.linear",),
    "final_layer.adaLN_modulation.1": (f"{_FINAL}.adaLN_modulation.1",),
}
NORMS: dict[str, tuple[str, ...]] = {}
FUSED: dict[str, tuple[str, ...]] = {}
for _block in (f"{name}.{{i}}.attention" for name in _BLOCKS):
    NORMS |= {f"{_block}.q_norm": (f"{_block}.norm_q",), f"{_block}.k_norm": (f"{_block}.norm_k",)}
    FUSED |= {
        f"{_block}.qkv": (f"{_block}.to_q", f"{_block}.to_k", f"{_block}.to_v"),
        f"{_block}.out": (f"{_block}.to_out.0",),
    }
# As a trainer writes them that takes all underscores for dots.
DOTTED = {
    f"{name}.{{i}}.attention.to.{part}": (f"{name}.{{i}}.attention.to_{part}",) for name in _BLOCKS for part in "qkv"
}

LORA = LoraNames(
    spellings=(
        Spelling("transformer"),
        Spelling("transformer", joint="_"),
        Spelling("transformer", table=ORIGINAL | NORMS | DOTTED),
        Spelling("transformer", table=ORIGINAL | NORMS, joint="_"),
        Spelling("transformer", table=FUSED, repeats=True),
        Spelling("transformer", table=FUSED, joint="_", repeats=True),
    ),
    # One name of each layout, for the sentence that says which there are.
    layouts={
        "PEFT and diffusers": "transformer.layers.0.attention.to_q.lora_A.weight",
        "ComfyUI": "diffusion_model.layers.0.attention.qkv.lora_up.weight",
        "kohya": "lora_unet_layers_0_attention_to_q.lora_down.weight",
        "dotted": "layers.0.attention.to.q.lora.down.weight",
    },
    native=ORIGINAL | FUSED,
)

"""Which names in LoRA files mean which layers of Ideogram 4: tables, no code.

The layers' own names are diffusers'. The authors' modules, which trainers take, hold queries, keys and values in one
matrix; the published folder may as well (`layouts.py`). LoRAs change the transformer that sees the prompt alone, as
trainers train it.
"""

from __future__ import annotations

from mflux.models.common.lora.names import LoraNames, Spelling

_ATTENTION = "layers.{i}.attention"
FUSED: dict[str, tuple[str, ...]] = {
    f"{_ATTENTION}.qkv": (f"{_ATTENTION}.to_q", f"{_ATTENTION}.to_k", f"{_ATTENTION}.to_v"),
    f"{_ATTENTION}.o": (f"{_ATTENTION}.to_out.0",),
}
# kohya's, where the last layer stands for itself.
_LAST = {"final_linear": ("final_layer.linear",)}

LORA = LoraNames(
    spellings=(
        Spelling("transformer"),
        Spelling("transformer", joint="_"),
        Spelling("transformer", table=FUSED),
        Spelling("transformer", table=FUSED | _LAST, joint="_"),
    ),
    # One name of each layout, for the sentence that says which there are.
    layouts={
        "PEFT and diffusers": "transformer.layers.0.attention.to_q.lora_A.weight",
        "ai-toolkit and ComfyUI": "diffusion_model.layers.0.attention.qkv.lora_A.weight",
        "kohya": "lora_unet_layers_0_attention_qkv.lora_down.weight",
        "LyCORIS LoKr": "lycoris_layers_0_attention_to_q.lokr_w1",
    },
)

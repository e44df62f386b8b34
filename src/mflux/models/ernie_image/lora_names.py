"""Which names in LoRA files mean which layers of ERNIE-Image: tables, no code.

All tools use its own names, which are diffusers'; they differ in what stands before them and between their parts.
"""

from __future__ import annotations

from mflux.models.common.lora.names import LoraNames, Spelling

# As mflux 0.24 spells it.
MFLUX: dict[str, tuple[str, ...]] = {"adaln_modulation": ("adaLN_modulation.1",)}

LORA = LoraNames(
    (
        Spelling("transformer"),
        Spelling("transformer", table=MFLUX),
        Spelling("transformer", joint="_"),
    ),
    # One name of each layout, for the sentence that says which there are.
    {
        "PEFT and diffusers": "transformer.layers.0.self_attention.to_q.lora_A.weight",
        "ai-toolkit": "diffusion_model.layers.0.self_attention.to_q.lora_A.weight",
        "kohya": "lora_unet_layers_0_self_attention_to_q.lora_down.weight",
    },
)

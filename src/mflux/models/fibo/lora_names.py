"""Which names in LoRA files mean which layers of FIBO: tables, no code.

diffusers loads and saves them under its transformer's own names; tools that join names do so with these.
"""

from __future__ import annotations

from mflux.models.common.lora.names import LoraNames, Spelling

LORA = LoraNames(
    (
        Spelling("transformer"),
        Spelling("transformer", joint="_"),
    ),
    # One name of each layout, for the sentence that says which there are.
    {
        "PEFT and diffusers": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "kohya": "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight",
        "LyCORIS LoKr": "lycoris_transformer_blocks_0_attn_to_q.lokr_w1",
    },
)

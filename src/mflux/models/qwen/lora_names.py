"""Which names in LoRA files mean which layers of Qwen-Image: tables, no code.

All tools use its own names, which are diffusers'; they differ in what stands before them and between their parts.
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
        "Lightning": "transformer_blocks.0.attn.to_q.lora_down.weight",
        "ai-toolkit and ComfyUI": "diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight",
        "DiffSynth": "transformer_blocks.0.attn.to_q.lora_A.default.weight",
        "musubi": "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight",
        "LyCORIS LoKr": "lycoris_transformer_blocks_0_attn_to_q.lokr_w1",
    },
)

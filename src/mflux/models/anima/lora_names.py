"""Which names in LoRA files mean which layers of Anima: tables, no code.

The layers' own names are diffusers'. The authors' names are those of the single-file checkpoints, which `layouts.py`
reads by the same tables; there the text conditioner stands in the transformer.
"""

from __future__ import annotations

from mflux.models.common.lora.names import LoraNames, Spelling

_BLOCK = "transformer_blocks.{i}"
_NORMS = {"self_attn": "norm1", "cross_attn": "norm2", "mlp": "norm3"}
_ATTENTION = {"self_attn": "attn1", "cross_attn": "attn2"}
_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0"}

ORIGINAL: dict[str, tuple[str, ...]] = {
    "x_embedder.proj.1": ("patch_embed.proj",),
    "t_embedder.1.linear_1": ("time_embed.t_embedder.linear_1",),
    "t_embedder.1.linear_2": ("time_embed.t_embedder.linear_2",),
    "final_layer.adaln_modulation.1": ("norm_out.linear_1",),
    "final_layer.adaln_modulation.2": ("norm_out.linear_2",),
    "final_layer.linear": ("proj_out",),
    "blocks.{i}.mlp.layer1": (f"{_BLOCK}.ff.net.0.proj",),
    "blocks.{i}.mlp.layer2": (f"{_BLOCK}.ff.net.2",),
    **{
        f"blocks.{{i}}.adaln_modulation_{part}.{number}": (f"{_BLOCK}.{norm}.linear_{number}",)
        for part, norm in _NORMS.items()
        for number in (1, 2)
    },
    **{
        f"blocks.{{i}}.{theirs}.{name}": (f"{_BLOCK}.{ours}.{layer}",)
        for theirs, ours in _ATTENTION.items()
        for name, layer in _PROJECTIONS.items()
    },
}
# What no LoRA changes, and a single file has.
NORMS: dict[str, tuple[str, ...]] = {
    "t_embedding_norm": ("time_embed.norm",),
    **{
        f"blocks.{{i}}.{theirs}.{name}_norm": (f"{_BLOCK}.{ours}.norm_{name}",)
        for theirs, ours in _ATTENTION.items()
        for name in ("q", "k")
    },
}
ADAPTER = "llm_adapter."
CONDITIONER: dict[str, tuple[str, ...]] = {
    f"{ADAPTER}{layer}": (layer,)
    for layer in (
        "out_proj", "blocks.{i}.mlp.0", "blocks.{i}.mlp.2",
        *(f"blocks.{{i}}.{part}.{name}_proj" for part in ("self_attn", "cross_attn") for name in "qkvo"),
    )
}  # fmt: skip

_SPELLINGS = (
    Spelling("transformer"),
    Spelling("transformer", joint="_"),
    Spelling("transformer", table=ORIGINAL),
    Spelling("transformer", table=ORIGINAL, joint="_"),
    Spelling("text_conditioner", prefixes=("text_conditioner.",)),
    Spelling("text_conditioner", table=CONDITIONER),
    Spelling("text_conditioner", table=CONDITIONER, joint="_"),
)

# One name of each layout, for the sentence that says which there are.
_LAYOUTS = {
    "PEFT and diffusers": "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight",
    "ComfyUI": "diffusion_model.blocks.0.self_attn.q_proj.lora_A.weight",
    "kohya": "lora_unet_blocks_0_self_attn_q_proj.lora_down.weight",
    "LyCORIS LoKr": "lycoris_blocks_0_self_attn_q_proj.lokr_w1",
}

LORA = LoraNames(_SPELLINGS, _LAYOUTS)

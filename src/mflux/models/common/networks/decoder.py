"""Today's language models, as text encoders (hidden states, no next token) and as layers that FIBO-VLM shares.

LLaMA's decoder (Touvron et al. 2023, https://arxiv.org/abs/2302.13971) with grouped-query attention (Ainslie et al.
2023, https://arxiv.org/abs/2305.13245). Where its descendants differ is a property of their configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from mflux.backend import mx, nn
from mflux.checkpoints.loading import FileDifferences
from mflux.errors import CheckpointError
from mflux.models.common.component_config import ComponentConfig
from mflux.models.common.networks.layers import (
    ACTIVATIONS,
    Embedding,
    Linear,
    RMSNorm,
    Rotary,
    SwiGLU,
    attention,
    embedded,
    inverse_frequencies,
    merge_heads,
    rotate_halves,
    split_heads,
)
from mflux.models.common.networks.yarn import yarn_frequencies, yarn_problem, yarn_scale


@dataclass(frozen=True)
class DecoderConfig(ComponentConfig):
    """What every decoder's `config.json` says; defaults are those of Qwen3's 4B size.

    Rotary settings stand in `rope_parameters`, as transformers 5 writes them, or in `rope_scaling` and `rope_theta`.
    """

    model_type: str = "qwen3"
    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    rope_theta: float = 1_000_000.0
    rope_scaling: Mapping[str, Any] | None = None
    rope_parameters: Mapping[str, Any] | None = None
    use_sliding_window: bool = False
    layer_types: tuple[str, ...] | None = None

    # Not in the files: the `model_type` to insist on, where these values stand in the file of a model that is more than
    # a decoder ("text_config"), whether each head's queries and keys are normed, and which rotary positions can be
    # built.
    kind = ""
    part: ClassVar[str] = ""
    qk_norm = True
    rope_types: ClassVar[tuple[str, ...]] = ("default",)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: object = "config.json") -> Self:
        if cls.part and isinstance(values, Mapping) and cls.part in values:
            values, source = values[cls.part], f"{cls.part} of {source}"
        return super().from_dict(values, source=source)

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def output_bias(self) -> bool:
        """Whether attention's last projection has a bias; the others have one if `attention_bias` says so."""
        return self.attention_bias

    def has_positions(self, layer: int) -> bool:
        """Whether a layer, counted from 0, turns its queries and keys by their positions."""
        return True

    @property
    def rope(self) -> Mapping[str, Any]:
        return {"rope_theta": self.rope_theta} | dict(self.rope_parameters or self.rope_scaling or {})

    @property
    def rope_type(self) -> str:
        kind: str = self.rope.get("rope_type", self.rope.get("type", "default"))
        return kind

    def check(self) -> str | None:
        if self.kind and self.model_type != self.kind:
            return f"this is a model of type {self.model_type!r}, and {self.kind!r} belongs here"
        if self.hidden_act not in ACTIVATIONS:
            return f"hidden_act {self.hidden_act!r} is not known"
        if self.num_hidden_layers < 1 or self.num_attention_heads < 1:
            return f"{self.num_hidden_layers} layers of {self.num_attention_heads} heads are no decoder"
        if self.num_attention_heads % self.kv_heads:
            return f"{self.num_attention_heads} heads cannot share {self.kv_heads} keys and values"
        if self.head_size % 2:
            return f"head_dim {self.head_size} is odd"
        if self.rope_type not in self.rope_types:
            return f"rotary positions of type {self.rope_type!r} are not built"
        if not self.rope["rope_theta"] > 0:
            return f"rope_theta {self.rope['rope_theta']} is not a positive number"
        if self.rope_type == "yarn" and (problem := yarn_problem(self.head_size, self.rope)):
            return problem
        if self.use_sliding_window or any(kind != "full_attention" for kind in self.layer_types or ()):
            return "attention in a sliding window is not built"
        return None


class DecoderAttention(nn.Module):
    """Several heads of queries share a head of keys and values."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        width, head, bias = config.hidden_size, config.head_size, config.attention_bias
        self.heads, self.kv_heads = config.num_attention_heads, config.kv_heads
        self.q_proj = Linear(width, self.heads * head, bias=bias)
        self.k_proj = Linear(width, self.kv_heads * head, bias=bias)
        self.v_proj = Linear(width, self.kv_heads * head, bias=bias)
        self.o_proj = Linear(self.heads * head, width, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(head, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(head, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, rotary: Rotary | None, mask: mx.array | str | None, cache: Any) -> mx.array:
        q = split_heads(self.q_proj(x), self.heads)
        k = split_heads(self.k_proj(x), self.kv_heads)
        v = split_heads(self.v_proj(x), self.kv_heads)
        if "q_norm" in self:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate_halves(q, rotary), rotate_halves(k, rotary)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.o_proj(merge_heads(attention(q, k, v, mask=mask)))


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.self_attn = DecoderAttention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, activation=config.hidden_act)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self, x: mx.array, rotary: Rotary | None, mask: mx.array | str | None = None, cache: Any = None
    ) -> mx.array:
        """One layer on hidden states (B, L, hidden_size).

        Args:
            rotary: cosines and sines (L, head_size / 2), see `text_rotary`; None for a layer that knows no positions.
            mask: "causal", what `causal_mask` makes, or None where everything may be seen.
            cache: its `extend(keys, values)` keeps them and gives back all that there are so far.
        """
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class DecoderStack(nn.Module):
    """The token embedding and the first `depth` layers, and the final norm if `norm` says so."""

    def __init__(self, config: DecoderConfig, depth: int, *, norm: bool):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(depth)]
        if norm:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def hidden_states(
        self,
        embeddings: mx.array,
        rotary: Rotary,
        mask: mx.array | str | None,
        wanted: Sequence[int],
        *,
        cache: Sequence[Any] | None = None,
        deepstack: Sequence[mx.array] = (),
    ) -> list[mx.array]:
        """Hidden states (B, L, hidden_size) after the layers that `wanted` counts from 1, 0 being `embeddings`.

        Args:
            cache: one for each layer, see `DecoderLayer`.
            deepstack: what to add after the first layers, each as the embeddings are.
        """
        x = embeddings
        states = {0: x}
        for number, layer in enumerate(self.layers):
            turned = rotary if self.config.has_positions(number) else None
            x = layer(x, turned, mask, None if cache is None else cache[number])
            if number < len(deepstack):
                x = x + deepstack[number]
            if number + 1 in wanted:
                is_normed = "norm" in self and number + 1 == self.config.num_hidden_layers
                states[number + 1] = self.norm(x) if is_normed else x
        return [states[number] for number in wanted]


class DecoderTextEncoder(nn.Module):
    """Token ids → hidden states.

    A subclass names its configuration and the hidden states that it is for; nothing above the highest of them is built
    or loaded, whatever the files hold.

    Attributes:
        hidden_states: 0 is the token embedding, k what layer k puts out, and the last one is normed; negative numbers
            count from it (-1).
        norms_last: False gives the last one as its layer puts it out.
        place: where the files of the whole model have the language model, "language_model.model". A re-saved file may
            lack it.
        beside: what else such files have, by the beginnings of names: towers that no text goes through.
    """

    config_class: type[DecoderConfig] = DecoderConfig
    hidden_states: tuple[int, ...] = (-1,)
    norms_last: ClassVar[bool] = True
    place: ClassVar[str] = "model"
    beside: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.wanted = resolved(self.hidden_states_of(config), config.num_hidden_layers)
        depth, has_norm = max(self.wanted), self.norms_last and config.num_hidden_layers in self.wanted
        *outer, name = self.place.split(".")
        holder: nn.Module = self
        for step in outer:
            holder[step] = nn.Module()
            holder = holder[step]
        holder[name] = DecoderStack(config, depth, norm=has_norm)
        prefix = f"{self.place}."
        unused = unused_patterns(prefix, depth, config.num_hidden_layers, norm=has_norm)
        towers = tuple(f"^{re.escape(start)}" for start in self.beside)
        self.differences = FileDifferences(ignored=(*unused, *towers), optional_prefix=prefix)

    @property
    def decoder(self) -> DecoderStack:
        """The language model, wherever its place is."""
        found: nn.Module = self
        for step in self.place.split("."):
            found = found[step]
        assert isinstance(found, DecoderStack)
        return found

    @classmethod
    def hidden_states_of(cls, config: Any) -> tuple[int, ...]:
        """The hidden states that are given for a configuration."""
        return cls.hidden_states

    def __call__(self, input_ids: mx.array, attention_mask: mx.array | None = None) -> list[mx.array]:
        """Encode a batch of prompts.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L), 1 for tokens and 0 for the padding after them; None if nothing is padded. Every
                prompt has a token.

        Returns:
            The hidden states in the order of `hidden_states`, (B, L, hidden_size) each. At padding they are what the
            reference has there: padding sees the prompt, not itself.
        """
        length = input_ids.shape[1]
        rotary = text_rotary(mx.arange(length), self.config)
        mask = causal_mask(attention_mask, length)
        embeddings = embedded(self.decoder.embed_tokens, input_ids)
        return self.decoder.hidden_states(embeddings, rotary, mask, self.wanted)


def resolved(hidden_states: Sequence[int], layers: int) -> tuple[int, ...]:
    """Numbers of hidden states without negative ones.

    Raises:
        CheckpointError: the model has too few layers.
    """
    wanted = tuple(number + layers + 1 if number < 0 else number for number in hidden_states)
    if not all(0 <= number <= layers for number in wanted):
        asked = ", ".join(map(str, hidden_states))
        raise CheckpointError(
            f"the text encoder's config.json says {layers} layers, and hidden states {asked} are needed: it is another "
            "model's; fetch the one that belongs here"
        )
    return wanted


def unused_patterns(prefix: str, depth: int, layers: int, *, norm: bool) -> tuple[str, ...]:
    """Names that files hold beside the `depth` lowest of so many layers, as patterns: what `FileDifferences` ignores.

    Args:
        prefix: of the decoder's names, which re-saved files may lack.
        norm: whether the final norm is built.
    """
    start = f"^(?:{re.escape(prefix)})?"
    unused = [r"^lm_head\.weight$", r"rotary_emb\.inv_freq$"]
    if depth < layers:
        unused.append(rf"{start}layers\.(?:{'|'.join(map(str, range(depth, layers)))})\.")
    if not norm:
        unused.append(rf"{start}norm\.weight$")
    return tuple(unused)


def text_rotary(positions: mx.array, config: DecoderConfig) -> Rotary:
    """Cosines and sines of positions (L,): (L, head_size / 2) each, float32."""
    is_yarn = config.rope_type == "yarn"
    frequencies = (
        yarn_frequencies(config.head_size, config.rope)
        if is_yarn
        else inverse_frequencies(config.head_size, config.rope["rope_theta"])
    )
    angles = positions[:, None].astype(mx.float32) * frequencies
    scale = yarn_scale(config.rope) if is_yarn else 1.0
    cos, sin = mx.cos(angles), mx.sin(angles)
    return (cos, sin) if scale == 1 else (scale * cos, scale * sin)


def causal_mask(attention_mask: mx.array | None, length: int) -> mx.array | str:
    """A token sees itself and what is before it, without padding.

    Args:
        attention_mask: (B, L), 1 for tokens and 0 for the padding after them; None if nothing is padded.

    Returns:
        What `attention` takes: (B, 1, L, L), true where a row's token sees a column's, or a word for all of them.
    """
    if attention_mask is None:
        return "causal"
    at = mx.arange(length)
    return (at[:, None] >= at) & (attention_mask[:, None, None, :] != 0)

"""Would the parity tests notice a tensor in the wrong place?

Two tensors of the same shape are the mistake that strict loading cannot see. For each component every such pair of its
tiny checkpoint is swapped in our module, and the result must leave the reference by far more than parity allows.
Pairs that cannot change the output are listed with the reason, and swapped in the reference as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
import reference
import torch
from diffusers import FluxPipeline
from mlx.utils import tree_flatten
from reference import COMPONENT, as_numpy, normal, relative_error, save

from mflux.backend import mx, nn
from mflux.checkpoints.loading import FolderTensors, load_component, match
from mflux.models.common.autoencoders.kl import AutoencoderKL
from mflux.models.common.text_encoders.clip import CLIPTextEncoder
from mflux.models.common.text_encoders.t5 import T5Encoder
from mflux.models.flux.model.transformer import FluxTransformer, latent_image_ids

# A swap must show at least this much more than what parity lets pass.
MARGIN = 50


@dataclass
class Case:
    """One component on fixed inputs, ours and the reference's, each giving all that it puts out, one by one."""

    module: nn.Module
    run: Callable[[], Iterable[mx.array]]
    reference: torch.nn.Module
    run_reference: Callable[[], Iterable[torch.Tensor]]
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    def pairs(self) -> list[tuple[str, str]]:
        """Names in the file whose tensors could take each other's place."""
        return [pair for pair in combinations(sorted(self.shapes), 2) if self.shapes[pair[0]] == self.shapes[pair[1]]]


def build(folder, module_class, model, run, run_reference, **options) -> Case:
    save(model, folder, **options)
    module = load_component(module_class, folder)
    tensors = FolderTensors(folder)
    parameters = match(module, dict(tree_flatten(module.parameters())), tensors, source=folder)
    names = {name: parameter for parameter, name in parameters.items()}
    shapes = {name: tuple(tensors[name].shape) for name in names}
    return Case(module, lambda: run(module), model, lambda: run_reference(model), names, shapes)


def clip_case(folder) -> Case:
    ids = np.random.default_rng(0).integers(3, 64, (2, 11))
    model = reference.clip_model(hidden_size=16, intermediate_size=16, num_attention_heads=2, eos_token_id=63)
    ids[:, 8] = 63

    def run(module):
        return module(mx.array(ids))

    def run_reference(model):
        result = model(torch.tensor(ids))
        return [result.last_hidden_state, result.pooler_output]

    return build(folder, CLIPTextEncoder, model, run, run_reference)


def t5_case(folder, gated: bool) -> Case:
    ids = np.random.default_rng(0).integers(3, 64, (2, 13))
    model = reference.t5_model(
        d_model=16, d_kv=8, num_heads=2, d_ff=16, feed_forward_proj="gated-gelu" if gated else "relu", num_layers=3
    )

    def run(module):
        return [module(mx.array(ids))]

    def run_reference(model):
        return [model(torch.tensor(ids)).last_hidden_state]

    return build(folder, T5Encoder, model, run, run_reference)


def vae_case(folder, attention: bool) -> Case:
    model = reference.vae_model(
        block_out_channels=[4, 8],
        norm_num_groups=2,
        use_quant_conv=True,
        use_post_quant_conv=True,
        mid_block_add_attention=attention,
    )
    image, latents = np.tanh(normal(1, 1, 3, 12, 8)), normal(2, 1, 4, 6, 4)
    shift, factor = model.config.shift_factor, model.config.scaling_factor

    def run(module):
        yield module.encode(mx.array(image))
        yield module.decode(mx.array(latents))

    def run_reference(model):
        mean = (model.encode(torch.tensor(image)).latent_dist.mode() - shift) * factor
        return [mean, model.decode(torch.tensor(latents) / factor + shift).sample]

    return build(folder, AutoencoderKL, model, run, run_reference)


def transformer_case(folder, guidance: bool) -> Case:
    # All widths equal where the architecture allows it, so that as many tensors as can be are of the same shape.
    model = reference.transformer_model(
        in_channels=16,
        attention_head_dim=8,
        num_attention_heads=2,
        axes_dims_rope=[2, 2, 4],
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        num_layers=2 - guidance,
        num_single_layers=1 + guidance,
    )
    latents, text, pooled = normal(1, 2, 6, 16), normal(2, 2, 5, 16), normal(3, 2, 16)
    sigma, strength = np.array([0.9, 0.4], np.float32), np.array([3.5, 1.5], np.float32)

    def run(module):
        return [
            module(
                mx.array(latents),
                sigma=mx.array(sigma),
                prompt_embeds=mx.array(text),
                pooled_prompt_embeds=mx.array(pooled),
                image_ids=latent_image_ids(3, 2),
                guidance=mx.array(strength) if guidance else None,
            )
        ]

    def run_reference(model):
        return [
            model(
                hidden_states=torch.tensor(latents),
                encoder_hidden_states=torch.tensor(text),
                pooled_projections=torch.tensor(pooled),
                timestep=torch.tensor(sigma),
                guidance=torch.tensor(strength) if guidance else None,
                img_ids=FluxPipeline._prepare_latent_image_ids(1, 3, 2, "cpu", torch.float32),
                txt_ids=torch.zeros(5, 3),
            ).sample
        ]

    return build(folder, FluxTransformer, model, run, run_reference)


# ---- pairs that cannot change the output


def same_sum_in_the_condition(first: str, second: str) -> bool:
    """The embeddings of time, guidance and prompt are added up, and with them the biases of their last layers."""
    return all(name.startswith("time_text_embed.") and name.endswith(".linear_2.bias") for name in (first, second))


def key_biases(first: str, second: str) -> bool:
    """A key's bias adds the same to a query's product with every key, and softmax takes out what all have in common."""
    return all(name.endswith((".k_proj.bias", ".to_k.bias")) for name in (first, second))


def same_sum_in_a_resnet(first: str, second: str) -> bool:
    """A residual block adds its last convolution to its shortcut, and with them their biases."""
    ends = {name.rpartition(".resnets.")[2].split(".", 1)[1] for name in (first, second) if ".resnets." in name}
    blocks = {name.removesuffix(".conv2.bias").removesuffix(".conv_shortcut.bias") for name in (first, second)}
    return ends == {"conv2.bias", "conv_shortcut.bias"} and len(blocks) == 1


CASES = {
    # What to build; which pairs are neutral; how many of those the checkpoint has.
    "clip": (clip_case, [key_biases], 1),
    "t5": (lambda folder: t5_case(folder, gated=True), [], 0),
    "t5, not gated": (lambda folder: t5_case(folder, gated=False), [], 0),
    "vae": (lambda folder: vae_case(folder, attention=True), [key_biases, same_sum_in_a_resnet], 3),
    "vae without attention": (lambda folder: vae_case(folder, attention=False), [same_sum_in_a_resnet], 2),
    "transformer": (lambda folder: transformer_case(folder, guidance=False), [same_sum_in_the_condition], 1),
    "guided transformer": (lambda folder: transformer_case(folder, guidance=True), [same_sum_in_the_condition], 3),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory):
    make, reasons, count = CASES[request.param]
    case = make(tmp_path_factory.mktemp("mutation"))
    neutral = [pair for pair in case.pairs() if any(reason(*pair) for reason in reasons)]
    assert len(neutral) == count
    return case, neutral


def within(bound: float, results: Iterable, expected: list) -> bool:
    """Whether all outputs are; asks for no more of them once one is not."""
    return all(relative_error(ours, theirs) <= bound for ours, theirs in zip(results, expected, strict=True))


def test_swapping_two_tensors_shows(case):
    case, neutral = case
    expected = [as_numpy(value) for value in case.run_reference()]
    assert within(COMPONENT, case.run(), expected)

    places = {name: place_of(case.module, parameter) for name, parameter in case.names.items()}
    pairs = [pair for pair in case.pairs() if pair not in neutral]
    assert len(pairs) > len(case.shapes) / 2
    unseen = []
    for first, second in pairs:
        swap(places[first], places[second])
        if within(MARGIN * COMPONENT, case.run(), expected):
            unseen.append((first, second))
        swap(places[first], places[second])
    assert not unseen, f"{len(unseen)} of {len(pairs)} swaps go unnoticed"
    assert within(COMPONENT, case.run(), expected), "the swaps were not undone"


@torch.no_grad()
def test_neutral_pairs_are_neutral_in_the_reference_too(case):
    case, neutral = case
    expected = [as_numpy(value) for value in case.run_reference()]
    places = {name: place_of(case.module, parameter) for name, parameter in case.names.items()}
    theirs = dict(case.reference.named_parameters())
    for first, second in neutral:
        swap(places[first], places[second])
        assert within(COMPONENT, case.run(), expected)
        swap(places[first], places[second])

        one, two = (theirs[name.removeprefix("text_model.")] for name in (first, second))
        assert relative_error(one, two) > 0.1, "two equal tensors show nothing"
        exchange(one, two)
        assert within(COMPONENT, case.run_reference(), expected)
        exchange(one, two)


def place_of(module: nn.Module, parameter: str) -> tuple[dict | list, str | int]:
    """Where a parameter hangs in the module's tree: what holds it, and under which name."""
    *path, leaf = parameter.split(".")
    holder = module
    for step in path:
        holder = holder[int(step)] if isinstance(holder, list) else holder[step]
    return holder, int(leaf) if isinstance(holder, list) else leaf


def swap(first: tuple, second: tuple) -> None:
    (one, name), (other, other_name) = first, second
    assert one[name].shape == other[other_name].shape
    one[name], other[other_name] = other[other_name], one[name]


def exchange(one: torch.Tensor, other: torch.Tensor) -> None:
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)

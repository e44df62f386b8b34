"""Training beside torch, PEFT and diffusers, for every family that lists `TRAINING`: what is learned from, the loss,
its gradients, a step, and the file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from support.cases import Training, every
from support.reference import as_numpy, relative_error
from support.tiny import write_checkpoint

from mflux import cpu
from mflux.backend import mx
from mflux.checkpoints.quantization import QuantizedLinear
from mflux.models.common.training import lora, objective
from mflux.models.common.training.lora import TrainedLinear
from mflux.models.common.training.optimizer import Optimizer
from mflux.models.common.training.recompute import forget, remember
from mflux.models.common.training.session import TrainingSession
from mflux.models.common.training.spec import TrainingSpec

CASES: dict[str, Training] = every("TRAINING")
SIZES = ((64, 48), (48, 80), (64, 48))
SIGMAS = (0.9, 0.35, 0.6)
RATE, DECAY = 1e-3, 0.02

# What differs at most.
ENCODED, LOSS, GRADIENT, LAYER, STEP = 1e-4, 1e-5, 1e-4, 1e-3, 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")


class Both:
    """One run on both sides, with the same random factors."""

    def __init__(self, case: Training, folder: Path, **changes):
        self.case, self.folder = case, folder
        self.model = case.write(folder / "model")
        self.spec = TrainingSpec.from_conf(self.configuration(**changes), folder / "c.json", create_output_dir=False)
        self.session = TrainingSession(self.spec)
        weights = self.session.lora_weights()
        drawn = np.random.default_rng(5)
        self.weights = {
            name: (drawn.standard_normal(value.shape) / value.shape[-1] ** 0.5).astype(np.float32)
            if value.ndim == 2
            else np.array(value) * drawn.uniform(0.8, 1.2, value.shape).astype(np.float32)
            for name, value in weights.items()
        }
        self.session.set_lora_weights({name: mx.array(value) for name, value in self.weights.items()})
        self.noise = [drawn.standard_normal(item.clean_latents.shape).astype(np.float32) for item in self.session.items]
        self.transformer = getattr(diffusers, case.transformer).from_pretrained(self.model / "transformer")
        self.transformer.requires_grad_(False)

    def configuration(self, **changes) -> dict:
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        for number, ((width, height), caption) in enumerate(zip(SIZES, self.case.captions, strict=True)):
            image(number, width, height).save(data / f"{number}{'_out' if self.case.pairs else ''}.png")
            if self.case.pairs:
                image(10 + number, 48 + 16 * number, 64).save(data / f"{number}_in.png")
            (data / f"{number}{'_in' if self.case.pairs else ''}.txt").write_text(caption)
        config = {
            "model": self.case.model,
            "model_path": str(self.model),
            "data": "data",
            "seed": 4,
            "steps": 4,
            "guidance": self.case.guidance,
            "training_loop": {"num_epochs": 1, "batch_size": 3},
            "optimizer": {
                "name": "AdamW",
                "learning_rate": RATE,
                "max_grad_norm": 0.5,
                "optimizer_params": {"weight_decay": DECAY},
            },
            "checkpoint": {"save_frequency": 1, "output_path": str(self.folder / "out")},
            "lora_layers": {"targets": list(self.case.targets)},
        }
        return config | changes

    # ---- the reference's side

    def wrap(self, **kind: bool) -> dict[str, torch.nn.Parameter]:
        """The reference's transformer with PEFT's layers; their factors by the names that the session has."""
        layers = self.session.layers
        config = LoraConfig(
            r=1,
            lora_alpha=1,
            # Of a list PEFT takes each for the end of a name as well.
            target_modules="|".join(re.escape(layer.path) for layer in layers),
            rank_pattern={f"^{layer.path}$": layer.rank for layer in layers},
            alpha_pattern={f"^{layer.path}$": layer.alpha for layer in layers},
            **kind,
        )
        self.transformer.add_adapter(config)
        found = {
            name.replace("_vector.default.weight", "_vector").replace(".default.weight", ".weight"): parameter
            for name, parameter in self.transformer.named_parameters()
            if ".lora_" in name
        }
        assert found.keys() == self.weights.keys()
        with torch.no_grad():
            for name, parameter in found.items():
                parameter.copy_(torch.tensor(self.weights[name]))
        return found

    def loss(self) -> torch.Tensor:
        """The mean over images of each one's mean."""
        losses = []
        for item, sigma, noise in zip(self.session.items, SIGMAS, self.noise, strict=True):
            x, n = torch.tensor(as_numpy(item.clean_latents)), torch.tensor(noise)
            given = {name: torch.tensor(as_numpy(value)) for name, value in item.cond.items()}
            z = (1 - sigma) * x + sigma * n
            velocity = self.case.velocity(
                self.transformer, z, sigma, given, item.width, item.height, self.case.guidance
            )
            losses.append((velocity - (n - x)).square().mean())
        return torch.stack(losses).mean()

    # ---- ours

    def ours(self) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradients = self.session.loss_and_gradients(
            self.session.items, SIGMAS, [mx.array(noise) for noise in self.noise]
        )
        return float(loss), {name: np.array(value) for name, value in gradients.items()}


def image(seed: int, width: int, height: int) -> PIL.Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)


def compare(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], whole: float, layer: float) -> None:
    """
    Raises:
        AssertionError: all together, or those of one layer, differ by more.
    """
    assert ours.keys() == theirs.keys()
    difference = {name: np.linalg.norm(ours[name] - theirs[name]) for name in ours}
    length = {name: np.linalg.norm(theirs[name]) for name in ours}
    assert min(length.values()) > 0
    total = np.linalg.norm(list(length.values()))
    assert np.linalg.norm(list(difference.values())) <= whole * total
    # A factor whose gradient is nothing beside all others' has no digits of its own.
    worst = {name: difference[name] / max(length[name], 1e-4 * total) for name in ours}
    assert max(worst.values()) <= layer, max(worst, key=worst.get)


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory) -> Both:
    return Both(CASES[request.param], tmp_path_factory.mktemp("training"))


def test_training_agrees_with_torch_and_peft(both, tmp_path):
    """One test: the reference is wrapped once, and its parts follow from each other."""
    case, session = both.case, both.session

    # what is learned from
    for number, (item, (width, height)) in enumerate(zip(session.items, SIZES, strict=True)):
        source = image(10 + number, 48 + 16 * number, 64) if case.pairs else None
        latents, cond = case.encoded(both.model, image(number, width, height), item.prompt, width, height, source)
        assert (item.width, item.height) == (width, height)
        assert item.clean_latents.dtype == mx.float32 and len(item.clean_latents) == 1
        assert relative_error(item.clean_latents, latents) < ENCODED
        assert item.cond.keys() == cond.keys()
        for name, value in cond.items():
            assert relative_error(item.cond[name], value) < ENCODED, name

    # the loss and its gradients
    parameters = both.wrap()
    wanted = both.loss()
    wanted.backward()
    loss, gradients = both.ours()
    assert abs(loss - wanted.item()) <= LOSS * wanted.item()
    theirs = {name: parameter.grad.numpy().copy() for name, parameter in parameters.items()}
    compare(gradients, theirs, GRADIENT, LAYER)

    # the file, read by diffusers and PEFT
    path = tmp_path / "adapter.safetensors"
    session.save_adapter(path)
    check_file(both, path, wanted.item())
    for name, parameter in parameters.items():
        assert torch.equal(parameter, torch.tensor(both.weights[name]))

    # a step
    norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), 0.5)
    assert norm > 0.5
    torch.optim.AdamW(list(parameters.values()), lr=RATE, weight_decay=DECAY).step()
    assert session.apply({name: mx.array(value) for name, value in gradients.items()})
    after = {name: np.array(value) for name, value in session.lora_weights().items()}
    compare(after, {name: parameter.detach().numpy() for name, parameter in parameters.items()}, STEP, STEP)
    moved = {name: after[name] - both.weights[name] for name in after}
    steps = {name: parameter.detach().numpy() - both.weights[name] for name, parameter in parameters.items()}
    compare(moved, steps, 1e-3, 0.05)
    session.set_lora_weights({name: mx.array(value) for name, value in both.weights.items()})


def check_file(both: Both, path: Path, loss: float) -> None:
    layers = both.session.layers
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(f"{both.case.prefix}.{name}" for name in both.weights)
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert {name.split(".")[1] for name in told} == {
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
    }
    pipeline = getattr(diffusers, both.case.pipeline)
    transformer = getattr(diffusers, both.case.transformer).from_pretrained(both.model / "transformer")
    state, metadata = pipeline.lora_state_dict(path.parent, weight_name=path.name, return_lora_metadata=True)
    assert metadata is not None
    kept, both.transformer = both.transformer, transformer
    try:
        transformer.load_lora_adapter(state, prefix="transformer", metadata=metadata)
        scales = {name: module.scaling for name, module in transformer.named_modules() if hasattr(module, "scaling")}
        assert {name: list(one.values()) for name, one in scales.items()} == {
            layer.path: [layer.alpha / layer.rank] for layer in layers
        }
        with torch.no_grad():
            assert abs(both.loss().item() - loss) <= 1e-6 * loss
    finally:
        both.transformer = kept


def test_blocks_that_are_recomputed_give_the_same(both):
    loss, gradients = both.ours()
    transformer = both.session.pipeline.transformer
    before = forget(transformer, both.session.adapter.blocks)
    assert before
    try:
        again, recomputed = both.ours()
    finally:
        remember(transformer, before)
    assert again == loss
    compare(recomputed, gradients, 1e-5, 1e-4)


def test_mlx_s_own_kernels_give_the_same(both):
    loss, gradients = both.ours()
    with cpu.lazily():
        again, lazy = both.ours()
    assert again == pytest.approx(loss, rel=1e-5)
    compare(lazy, gradients, GRADIENT, LAYER)


FLUX = "flux training with guidance"


@pytest.mark.parametrize("kind", ["use_rslora", "use_dora"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_other_kinds_agree_with_peft(kind, recomputes, tmp_path):
    if FLUX not in CASES:
        pytest.skip("another family is tested")
    layers = {"targets": list(CASES[FLUX].targets), kind: True}
    both = Both(CASES[FLUX], tmp_path, lora_layers=layers, gradient_checkpointing=recomputes)
    parameters = both.wrap(**{kind: True})
    wanted = both.loss()
    wanted.backward()
    loss, gradients = both.ours()
    assert abs(loss - wanted.item()) <= LOSS * wanted.item()
    theirs = {name: parameter.grad.numpy().copy() for name, parameter in parameters.items()}
    compare(gradients, theirs, GRADIENT, LAYER)
    if kind == "use_dora":
        assert any("magnitude" in name for name in gradients)
    # What is generated with is what was trained.
    path = tmp_path / "adapter.safetensors"
    both.session.save_adapter(path)
    for bake in (True, False):
        pipeline = type(both.session.pipeline)(
            model_path=str(both.model),
            model_config=both.session.pipeline.registered,
            lora_paths=[str(path)],
            lora_scales=[1.0],
            bake_lora=bake,
        )
        pipeline.works_ahead = False
        kept, both.session.adapter.pipeline = both.session.adapter.pipeline, pipeline
        try:
            drawn = both.session.loss(both.session.items, SIGMAS, [mx.array(noise) for noise in both.noise])
        finally:
            both.session.adapter.pipeline = kept
        assert abs(float(drawn) - loss) <= LOSS * loss


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_agrees_with_torch(bits, tmp_path):
    """The reference has the numbers that the packed weights stand for. The factors are learned as they are, in
    float32; products with packed weights are MLX's and not unpacked ones."""
    if FLUX not in CASES:
        pytest.skip("another family is tested")
    write = partial(write_checkpoint, seed=3, guidance=True, wide=True)
    targets = (
        {"module_path": "transformer_blocks.{block}.attn.to_q", "blocks": "all", "rank": 4, "alpha": 8},
        {"module_path": "transformer_blocks.0.ff_context.net.2", "rank": 3},
        {"module_path": "single_transformer_blocks.0.proj_out", "rank": 2, "alpha": 3},
        {"module_path": "x_embedder", "rank": 2},
    )
    both = Both(replace(CASES[FLUX], write=write, targets=targets), tmp_path, quantize=bits)
    packed = 0
    for path, layer in both.session.pipeline.transformer.named_modules():
        if isinstance(layer, QuantizedLinear):
            reference = both.transformer.get_submodule(path.removesuffix(".linear"))
            before = reference.weight.clone()
            with torch.no_grad():
                reference.weight.copy_(torch.tensor(np.array(lora.dense(layer))))
            packed += not torch.equal(before, reference.weight)
    assert packed > 20
    parameters = both.wrap()
    wanted = both.loss()
    wanted.backward()
    loss, gradients = both.ours()
    assert abs(loss - wanted.item()) <= LOSS * wanted.item()
    compare(gradients, {name: one.grad.numpy() for name, one in parameters.items()}, GRADIENT, LAYER)


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    if FLUX not in CASES:
        pytest.skip("another family is tested")
    both = Both(CASES[FLUX], tmp_path_factory.mktemp("mistakes"))
    parameters = both.wrap()
    wanted = both.loss()
    wanted.backward()
    return both, wanted.item(), {name: one.grad.numpy() for name, one in parameters.items()}


def test_a_turned_sign_would_be_found(mistaken, monkeypatch):
    both, wanted, _ = mistaken
    true = objective.losses
    monkeypatch.setattr(objective, "losses", lambda velocity, clean, noise: true(-velocity, clean, noise))
    assert abs(both.ours()[0] - wanted) > 100 * LOSS * wanted


def test_a_mean_over_all_elements_would_be_found(mistaken, monkeypatch):
    """With images of several sizes it is another one."""
    both, wanted, _ = mistaken
    elements = [item.clean_latents.size for item in both.session.items]
    true = objective.losses

    def losses(velocity, clean, noise):
        return true(velocity, clean, noise) * clean[0].size * len(elements) / sum(elements)

    monkeypatch.setattr(objective, "losses", losses)
    assert abs(both.ours()[0] - wanted) > 100 * LOSS * wanted


def test_noise_levels_in_thousands_would_be_found(mistaken, monkeypatch):
    both, wanted, _ = mistaken
    true = both.session.adapter.velocity
    monkeypatch.setattr(
        both.session.adapter, "velocity", lambda config, z, sigmas, cond: true(config, z, 1000 * sigmas, cond)
    )
    assert abs(both.ours()[0] - wanted) > 100 * LOSS * wanted


def test_a_lost_alpha_would_be_found(mistaken, monkeypatch):
    both, wanted, theirs = mistaken
    for layer in both.session.pipeline.transformer.modules():
        if isinstance(layer, TrainedLinear):
            monkeypatch.setattr(layer, "_scale", 1.0)
    loss, gradients = both.ours()
    assert abs(loss - wanted) > 100 * LOSS * wanted
    with pytest.raises(AssertionError):
        compare(gradients, theirs, GRADIENT, LAYER)


def test_a_lost_alpha_in_the_file_would_be_found(mistaken, monkeypatch, tmp_path):
    both, wanted, _ = mistaken
    path = tmp_path / "adapter.safetensors"
    both.session.save_adapter(path)
    check_file(both, path, wanted)
    true = lora.metadata
    monkeypatch.setattr(lora, "metadata", lambda layers, **about: without_alphas(true(layers, **about), layers))
    both.session.save_adapter(path)
    with pytest.raises(AssertionError):
        check_file(both, path, wanted)


def without_alphas(found, layers):
    """What a file says that has forgotten its alphas."""
    told = json.loads(found["lora_adapter_metadata"])
    told["transformer.alpha_pattern"] = {f"^{layer.path}$": layer.rank for layer in layers}
    return found | {"lora_adapter_metadata": json.dumps(told)}


def test_missing_bias_correction_would_be_found(mistaken):
    both, _, theirs = mistaken
    spec = both.spec.optimizer
    weights = {name: mx.array(value) for name, value in both.weights.items()}
    gradients = {name: mx.array(value) for name, value in theirs.items()}
    right = Optimizer(spec, weights).apply(weights, gradients)
    spec.optimizer_params["bias_correction"] = False
    try:
        wrong = Optimizer(spec, weights).apply(weights, gradients)
    finally:
        del spec.optimizer_params["bias_correction"]
    with pytest.raises(AssertionError):
        compare(
            {name: np.array(wrong[name]) for name in wrong}, {name: np.array(right[name]) for name in right}, STEP, STEP
        )

"""Seconds and memory of each stage at published width, beside diffusers and transformers on torch.

    python benchmarks/steps.py [--only qwen …] [--pixels 512 1024] [--decode 256] [--repeats 2]
                               [--other-python PYTHON] [--before CHECKOUT] [--blas LIBRARY]

Of each transformer one or two blocks of each kind, with the embedders before them and the layers after them; of each
text encoder two layers, with a vocabulary of a thousand words; each autoencoder whole. Sizes are those of
tests/data/surface/configs.json, weights are random. Each part has a process of its own, in which both sides run in
turn, twice each (autoencoders above 512 px once), and the last time counts; a ratio is the median over the turns,
seconds the shortest. Memory is what a run adds to the process at most: activations, not weights. Needs the `test` group
of packages. `--other-python` names the Python of an environment with mflux 0.24.0, which then takes its turn as well,
behind each of the others', with transformers and decoders (steps_024.py); `--before` a checkout of this project as it
was, which takes its turn with everything; `--blas` the OpenBLAS that MLX has in these two.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OTHERS = ("024", "before")
# Of the quantized weights that are compared with whole ones.
BITS = 4
# What the kernel counts memory in.
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Part:
    """One thing to measure.

    Attributes:
        component: the name in tests/families, with its family: "flux transformer".
        entry: in configs.json.
        label: what is left of it.
        changes: entries of the configuration that make it small; an inner mapping changes the entries of one.
        inputs: from the reference's configuration and the pixels along a side.
        sized: how it depends on the pixels: "tokens", "decode", "encode" or "no".
    """

    component: str
    entry: str
    label: str
    changes: dict[str, Any]
    inputs: Callable[[Any, int], dict[str, Any]]
    sized: str = "tokens"

    @property
    def name(self) -> str:
        return f"{self.component}: {self.label}"


def draw(*shape: int):
    import numpy as np

    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def ids(config, length: int):
    import numpy as np

    return np.random.default_rng(0).integers(3, config.vocab_size - 3, (1, length))


# ---- what each family's models are given, one picture and no padding


def flux(config, pixels: int) -> dict:
    side = pixels // 16
    given = {
        "latents": draw(1, side * side, config.in_channels),
        "text": draw(1, 512, config.joint_attention_dim),
        "pooled": draw(1, config.pooled_projection_dim),
        "sigma": draw(1) * 0 + 0.5,
        "grid": (side, side),
    }
    return given | ({"guidance": draw(1) * 0 + 3.5} if config.guidance_embeds else {})


def flux2(config, pixels: int) -> dict:
    side = pixels // 16
    return {
        "latents": draw(1, side * side, config.in_channels),
        "text": draw(1, 512, config.joint_attention_dim),
        "sigma": draw(1) * 0 + 0.5,
        "grid": (side, side),
    }


def z_image(config, pixels: int) -> dict:
    return {
        "latents": draw(1, config.in_channels, pixels // 8, pixels // 8),
        "prompt_embeds": draw(1, 512, config.cap_feat_dim),
        "timestep": draw(1) * 0 + 0.5,
    }


def qwen(config, pixels: int) -> dict:
    import numpy as np

    side = pixels // 16
    return {
        "latents": draw(1, side * side, config.in_channels),
        "text": draw(1, 512, config.joint_attention_dim),
        "sigma": draw(1) * 0 + 0.5,
        "grids": np.array([[side, side]]),
    }


def fibo(config, pixels: int) -> dict:
    side = pixels // 16
    layers = config.num_layers + config.num_single_layers
    return {
        "latents": draw(1, side * side, config.in_channels),
        "states": draw(max(layers, 2), 1, 512, config.text_encoder_dim),
        "lengths": [512],
        "sigma": [0.5],
        "grid": (side, side),
    }


def ernie(config, pixels: int) -> dict:
    side = pixels // 16
    return {
        "latents": draw(1, config.in_channels, side, side),
        "text": draw(1, 512, config.text_in_dim),
        "sigma": draw(1) * 0 + 0.5,
    }


def krea2(config, pixels: int) -> dict:
    side = pixels // 16
    return {
        "latents": draw(1, side * side, config.in_channels),
        "text": draw(1, 512, config.num_text_layers, config.text_hidden_dim),
        "sigma": draw(1) * 0 + 0.5,
        "grid": (side, side),
    }


def ideogram4(config, pixels: int) -> dict:
    import numpy as np

    side = pixels // 16
    return {
        "latents": draw(1, side * side, config.in_channels),
        "text": draw(1, 512, config.llm_features_dim),
        "timestep": draw(1) * 0 + 0.5,
        "size": np.array([side, side]),
    }


def anima(config, pixels: int) -> dict:
    side = pixels // 8
    return {
        "latents": draw(1, config.in_channels, side, side),
        "text": draw(1, 512, config.text_embed_dim),
        "sigma": draw(1) * 0 + 0.5,
    }


def words(config, pixels: int) -> dict:
    import numpy as np

    found = ids(config, 512)
    return {"ids": found, "mask": np.ones(found.shape, np.int32)}


def qwen_words(config, pixels: int) -> dict:
    return {"ids": ids(config.text_config, 512)[0]}


def clip_words(config, pixels: int) -> dict:
    return {"ids": ids(config, 77)}


def t5_words(config, pixels: int) -> dict:
    return {"ids": ids(config, 512)}


def picture(config, pixels: int) -> dict:
    """What our encoder takes, and what the reference takes: a video of one frame, or the same."""
    whole = draw(1, 3, pixels, pixels).clip(-1, 1)
    if hasattr(config, "temperal_downsample"):
        return {"whole": whole, "inside": whole[:, :, None]}
    return {"whole": whole, "inside": whole}


def latents(config, pixels: int) -> dict:
    """What our decoder takes, and what the reference takes: a video of one frame, or not put together in squares."""
    if hasattr(config, "temperal_downsample"):
        side = pixels // (2 ** (len(config.dim_mult) - 1) * (getattr(config, "patch_size", None) or 1))
        whole = draw(1, config.z_dim, side, side)
        return {"whole": whole, "inside": whole[:, :, None]}
    side = pixels // 2 ** (len(config.block_out_channels) - 1)
    square = (getattr(config, "patch_size", None) or (1,))[0]
    whole = draw(1, config.latent_channels * square**2, side // square, side // square)
    return {"whole": whole, "inside": whole.reshape(1, -1, side, side)}


FEW_WORDS = {"vocab_size": 1000}
TWO_LAYERS = {"num_hidden_layers": 2} | FEW_WORDS
PARTS = (
    Part("flux transformer with guidance", "FLUX.1-dev/transformer", "a double block",
         {"num_layers": 1, "num_single_layers": 0}, flux),
    Part("flux transformer with guidance", "FLUX.1-dev/transformer", "a single block",
         {"num_layers": 0, "num_single_layers": 1}, flux),
    Part("flux text_encoder_2", "FLUX.1/text_encoder_2", "two layers, 512 words", {"num_layers": 2} | FEW_WORDS,
         t5_words, "no"),
    Part("flux text_encoder", "FLUX.1/text_encoder", "whole, 77 words", {}, clip_words, "no"),
    Part("flux vae", "FLUX.1/vae", "decode", {}, latents, "decode"),
    Part("flux vae", "FLUX.1/vae", "encode", {}, picture, "encode"),
    Part("flux2 transformer", "FLUX.2-klein-4B/transformer", "a double block",
         {"num_layers": 1, "num_single_layers": 0}, flux2),
    Part("flux2 transformer", "FLUX.2-klein-4B/transformer", "a single block",
         {"num_layers": 0, "num_single_layers": 1}, flux2),
    Part("flux2 vae", "FLUX.2/vae", "decode", {}, latents, "decode"),
    Part("flux2 vae", "FLUX.2/vae", "encode", {}, picture, "encode"),
    Part("z_image transformer", "Z-Image/transformer", "a block and a refiner of each kind",
         {"n_layers": 1, "n_refiner_layers": 1}, z_image),
    Part("z_image text_encoder", "Z-Image/text_encoder", "two layers, 512 words",
         {"num_hidden_layers": 3} | FEW_WORDS, words, "no"),
    Part("qwen transformer", "Qwen-Image/transformer", "a block", {"num_layers": 1}, qwen),
    Part("qwen text_encoder", "Qwen-Image/text_encoder (Qwen2.5-VL-7B)", "two layers, 512 words",
         {"text_config": TWO_LAYERS, "vision_config": {"depth": 1, "fullatt_block_indexes": [0]}} | TWO_LAYERS,
         qwen_words, "no"),
    Part("qwen vae", "Qwen-Image/vae", "decode", {}, latents, "decode"),
    Part("qwen vae", "Qwen-Image/vae", "encode", {}, picture, "encode"),
    Part("fibo transformer", "FIBO/transformer", "a double block", {"num_layers": 1, "num_single_layers": 0}, fibo),
    Part("fibo transformer", "FIBO/transformer", "a single block", {"num_layers": 0, "num_single_layers": 1}, fibo),
    Part("fibo text_encoder", "FIBO/text_encoder (SmolLM3-3B)", "two layers, 512 words, its vocabulary",
         {"num_hidden_layers": 2, "no_rope_layers": [1, 1]}, words, "no"),
    Part("fibo vae", "FIBO/vae (Wan 2.2)", "decode", {}, latents, "decode"),
    Part("fibo vae", "FIBO/vae (Wan 2.2)", "encode", {}, picture, "encode"),
    Part("ernie_image transformer", "ERNIE-Image/transformer", "a block", {"num_layers": 1}, ernie),
)  # fmt: skip
# Beside these, and in no table yet.
MORE = (
    Part("krea2 transformer", "Krea-2/transformer", "a block, and the text's four",
         {"num_layers": 1}, krea2),
    Part("ideogram4 transformer", "ideogram-4/transformer", "a block, with a prompt and without", {"num_layers": 1},
         ideogram4),
    Part("anima transformer", "Anima/transformer", "a block", {"num_layers": 1}, anima),
)  # fmt: skip
ALL = (*PARTS, *MORE)


# ---- both sides


def changed(config: dict, changes: dict) -> dict:
    merged = dict(config)
    for name, value in changes.items():
        merged[name] = changed(config[name], value) if isinstance(value, dict) else value
    return {name: value for name, value in merged.items() if not name.startswith("_") or name == "_class_name"}


Runs = dict[str, Callable[[], Any]]


def sides(part: Part, root: Path = ROOT) -> Callable[[int], Runs]:
    """Build both; gives a function from a number of pixels to what is to be run on each side, by its name."""
    import torch

    sys.path[:0] = [str(root / "src"), str(root / "tests")]
    from cpu import quantized
    from support.cases import every

    from mflux.backend import has_gpu, mx, tree_map

    if has_gpu():
        raise SystemExit(
            "error: this compares MLX and torch on a CPU, and MLX computes on a GPU here: benchmarks/gpu.py does that"
        )
    torch.set_grad_enabled(False)
    components = every("COMPONENTS")
    component = components[part.component]
    published = next(case for case in components.values() if part.entry in case.published and case.full_size)
    config = changed(json.loads((root / "tests/data/surface/configs.json").read_text())[part.entry], part.changes)
    reference = published.full_size(config).eval().float()

    def drawn():
        module = component.module(component.module.config_class.from_dict(config))
        module.update(tree_map(lambda value: mx.random.normal(value.shape) * 0.02, module.parameters()))
        mx.eval(module.parameters())
        return module

    module = drawn()
    small = quantized(drawn(), BITS) if part.sized == "tokens" else None

    def at(pixels: int) -> Runs:
        given = part.inputs(reference.config, pixels)
        if part.sized in ("decode", "encode"):
            whole, inside = mx.array(given["whole"]), torch.tensor(given["inside"])
            ours, theirs = getattr(module, part.sized), getattr(reference, part.sized)
            return {"torch": lambda: theirs(inside), "ours": lambda: mx.eval(ours(whole))}
        if part.component == "flux2 transformer":
            return flux2_runs(module, small, reference, given)
        runs = {
            "torch": lambda: next(iter(component.theirs(reference, given))),
            "ours": lambda: mx.eval(next(iter(component.ours(module, given)))),
        }
        return runs if small is None else runs | {"packed": lambda: mx.eval(next(iter(component.ours(small, given))))}

    return at


def flux2_runs(module, small, reference, given: dict) -> Runs:
    """FLUX.2's transformer for itself; its test runs other things along with this."""
    import torch
    from diffusers import Flux2KleinPipeline

    from mflux.backend import mx

    text = torch.tensor(given["text"])
    arguments = {
        "hidden_states": torch.tensor(given["latents"]),
        "encoder_hidden_states": text,
        "timestep": torch.tensor(given["sigma"]),
        "img_ids": Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 1, *given["grid"])),
        "txt_ids": Flux2KleinPipeline._prepare_text_ids(text),
    }
    arrays = given | {name: mx.array(given[name]) for name in ("latents", "sigma", "text")}

    def ours(module) -> Callable[[], None]:
        return lambda: mx.eval(flux2_ours(module, arrays))

    return {"torch": lambda: reference(**arguments), "ours": ours(module), "packed": ours(small)}


def flux2_ours(module, given: dict):
    """Ours alone."""
    from families.flux2.cases import grid_ids, text_ids

    from mflux.backend import mx

    return module(
        given["latents"],
        sigma=mx.array(given["sigma"]),
        prompt_embeds=given["text"],
        text_ids=text_ids(given["text"].shape[1]),
        image_ids=grid_ids(*given["grid"]),
    )


class Other:
    """Another mflux in a process of its own, which runs once whenever it is asked."""

    def __init__(self, call: list[str]):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self._process = subprocess.Popen(
            call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self._answer()

    def run(self, pixels: int) -> float:
        """Seconds."""
        self._process.stdin.write(f"{pixels}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {self._process.args} ended; started by hand it says why")
        return line


def of_024(python: str, part: Part, blas: str | None) -> Other:
    family, _, kind = part.component.partition(" ")
    name = f"{family} vae" if kind == "vae" else family
    counts = [*part.changes.values(), 0, 0][:2]
    script = str(Path(__file__).with_name("steps_024.py"))
    return Other([python, script, name, blas or "", *map(str, counts)])


def of_before(checkout: Path, part: Part, blas: str | None) -> Other:
    call = [sys.executable, __file__, "--answer", str(ALL.index(part)), "--root", str(checkout)]
    return Other([*call, *(("--blas", blas) if blas else ())])


def answer(part: Part, root: Path) -> None:
    """The other end of `of_before`: as steps_024.py, with the mflux of a checkout."""
    from mflux.models.common.memory import give_back_memory, keeping_memory

    at = sides(part, root)
    at(64)["ours"]()
    print("ready", flush=True)
    for line in sys.stdin:
        run = at(int(line))["ours"]
        give_back_memory()
        with keeping_memory() if part.sized == "tokens" else nullcontext():
            run()
            start = time.perf_counter()
            run()
            print(time.perf_counter() - start, flush=True)


class Added:
    """The most that the process's memory grew by while the block ran, looked at every few milliseconds."""

    def __enter__(self) -> Added:
        self._before = self._most = self._memory()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.bytes = self._most - self._before

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self._most = max(self._most, self._memory())

    def _memory(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def measure(part: Part, pixels: int, repeats: int, runs: Runs, others: dict[str, Other]) -> dict:
    from mflux.models.common.memory import give_back_memory, keeping_memory

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    added = dict.fromkeys(runs, 0)
    theirs: dict[str, list[float]] = {name: [] for name in others}
    for turn in range(repeats):
        # Who runs second finds the processor as the first has left it, so they take turns at that as well.
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            give_back_memory()
            # As in the denoising loop, behind its first step.
            kept = name != "torch" and part.sized == "tokens"
            with Added() as memory, keeping_memory() if kept else nullcontext():
                if part.sized == "tokens" or pixels <= 512:
                    runs[name]()
                start = time.perf_counter()
                runs[name]()
                seconds[name].append(time.perf_counter() - start)
            added[name] = max(added[name], memory.bytes)
        for name, other in others.items():
            theirs[name].append(other.run(pixels))
    return {
        "part": part.name,
        "pixels": pixels,
        "seconds": {name: min(taken) for name, taken in seconds.items()},
        "ratio": ratio(seconds["ours"], seconds["torch"]),
        **{f"ratio_{name}": ratio(seconds["ours"], theirs[name]) if name in theirs else None for name in OTHERS},
        "ratio_packed": ratio(seconds["packed"], seconds["ours"]) if "packed" in seconds else None,
        "added": added,
    }


def ratio(ours: list[float], others: list[float]) -> float:
    return statistics.median(one / two for one, two in zip(ours, others, strict=True))


# ---- the table


def row(found: dict, sized: str) -> str:
    pixels = f"{found['pixels']}" if sized != "no" else "–"
    seconds, added = found["seconds"], found["added"]
    cells = [
        found["part"], pixels, f"{seconds['ours']:.2f}", f"{seconds['torch']:.2f}", f"{found['ratio']:.2f}",
        *("–" if found[f"ratio_{name}"] is None else f"{found[f'ratio_{name}']:.2f}" for name in (*OTHERS, "packed")),
        f"{added['ours'] / 1e6:,.0f}", f"{added['torch'] / 1e6:,.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="families; all of them otherwise")
    parser.add_argument("--pixels", nargs="*", type=int, default=[512, 1024], help="for transformers (default: both)")
    parser.add_argument("--decode", nargs="*", type=int, default=[256], help="for autoencoders (default: 256)")
    parser.add_argument("--repeats", type=int, default=2, help="turns for each part; one above 512 px (default: 2)")
    parser.add_argument("--other-python", metavar="PYTHON", help="of an environment with mflux 0.24.0")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="an earlier state of this project")
    parser.add_argument("--blas", metavar="LIBRARY", help="OpenBLAS for MLX, in both of these")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file, row by row")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer is not None:
        sys.path[:0] = [str(args.root / "src"), str(args.root / "tests")]
        if args.blas:
            # What is loaded already is what MLX and mflux find under its name.
            ctypes.CDLL(args.blas, mode=ctypes.RTLD_GLOBAL)
        answer(ALL[args.answer], args.root)
        return
    if args.child is not None:
        part = ALL[args.child]
        at = sides(part)
        for run in at(64).values():
            run()
        others = {}
        if args.other_python and part.sized in ("tokens", "decode"):
            others["024"] = of_024(args.other_python, part, args.blas)
        if args.before:
            others["before"] = of_before(args.before, part, args.blas)
        for other in others.values():
            other.run(64)
        for pixels in {"tokens": args.pixels, "no": [0]}.get(part.sized, args.decode):
            found = measure(part, pixels, args.repeats if pixels <= 512 else 1, at(pixels), others)
            print(json.dumps(found), flush=True)
        return
    lines = [
        "| part | px | seconds | torch's | of torch's | of 0.24's | of before's "
        f"| {BITS} bits, of whole | MB added | torch's |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    print(*lines, sep="\n", flush=True)
    for number, part in enumerate(ALL):
        if args.only and part.component.split()[0] not in args.only:
            continue
        said = [
            word
            for name in ("other_python", "before", "blas")
            if (value := getattr(args, name))
            for word in (f"--{name.replace('_', '-')}", value)
        ]
        sizes = ["--pixels", *args.pixels, "--decode", *args.decode, "--repeats", args.repeats]
        call = [sys.executable, __file__, "--child", *map(str, (number, *sizes, *said))]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{part.name} failed:\n{done.stderr}")
        new = [row(json.loads(line), part.sized) for line in done.stdout.splitlines() if line.startswith("{")]
        print(*new, sep="\n", flush=True)
        lines += new
        if args.markdown:
            args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

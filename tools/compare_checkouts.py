"""Compare two checkouts of mflux: what they generate, save, print and refuse must be equal, bit for bit.

    git worktree add /tmp/before 22f3ae4
    python tools/compare_checkouts.py /tmp/before .                        # with the environment of the tests
    python tools/compare_checkouts.py /tmp/before . --baseline /tmp/kept   # /tmp/before runs the first time only
    python tools/compare_checkouts.py /tmp/before . --family qwen          # one family; commands: what belongs to none

The models are the embedded one and every family's tiny ones of random weights. The checkout that this file lies in
writes them once, with what to do with each as data; then each checkout runs that in a process of its own, which imports
only mflux by the paths of mflux 0.24, and nothing from the tests. Equal must be: latents after each step, pixels, the
settings in an image and beside it, every file of a saved folder, and of the commands the texts, exit statuses, help and
usage errors. What differs from run to run is left out. A failure is a result as well: it is told, and must be equal.
What only the second has is reported and is no difference. Ends with exit status 1 if anything differs or is gone.

Left out: FIBO's vision-language model, which needs transformers, and mflux-generate-in-context-edit's images, which
need a published LoRA.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import inspect
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIZE = {"num_inference_steps": 2, "width": 64, "height": 32}
SIZE_WORDS = ["--steps", "2", "--width", "64", "--height", "32"]
# Fields of the run, wherever settings and saved folders have them.
_OF_THE_RUN = ("created_at", "generation_time", "generation_time_seconds", "mflux_version", "version")
_MEASURED = re.compile(r"\d+\.\d+ GB|\d+(\.\d+)? s\b|(?<=Generation time \(s\): )[\d.]+|\d{4}-\d\d-\d\dT[\d:.]+")
_BAR = re.compile(r"\d+/\d+ \[")
_USAGE_ERRORS = (["--steps", "0"], ["--width", "x"], ["--seed", "-1"], ["-q", "7"], ["--lora", "nowhere.safetensors"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--family", help="only this one: flux, qwen, …, demo, commands")
    parser.add_argument("--baseline", type=Path, metavar="FOLDER", help="keep models and results of `before` here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kept = (args.baseline or Path(folder) / "kept").resolve()
        if not (kept / "before.json").exists():
            # Models of an interrupted run may be incomplete.
            shutil.rmtree(kept, ignore_errors=True)
            (kept / "models").mkdir(parents=True)
            start(ROOT, "--write", kept / "models", family="" if args.baseline else args.family)
            start(args.before, "--run", kept / "models", kept / "before.json")
        start(args.after, "--run", kept / "models", Path(folder) / "after.json", family=args.family)
        before, after = (
            {key: value for key, value in json.loads(path.read_text()).items() if of_family(key, args.family)}
            for path in (kept / "before.json", Path(folder) / "after.json")
        )
    equal = [key for key in before if key in after and before[key] == after[key]]
    for key in sorted((before.keys() | after.keys()) - set(equal)):
        what = "new" if key not in before else "gone" if key not in after else "differs"
        print(f"{what:8} {key}:\n  {before.get(key)!r}\n  {after.get(key)!r}")
    for key in sorted(key for key in equal if key.endswith(": status") and before[key] and "refused, " not in key):
        print(f"equal, but ends with {before[key]}: {key}")
    print(f"{len(equal)} of {len(before)} equal, {len(after.keys() - before.keys())} new")
    return 0 if before and len(equal) == len(before) else 1


def start(checkout: Path, *words: object, family: str | None = None) -> None:
    """Call this file again, in a process that imports mflux from a checkout and sees no settings of the user."""
    with tempfile.TemporaryDirectory() as home:
        settings = {name: value for name, value in os.environ.items() if not name.startswith(("MFLUX_", "HF_"))}
        settings |= {"PYTHONPATH": str(checkout.resolve() / "src"), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
        settings |= {"HOME": home, "XDG_CACHE_HOME": home, "HF_HOME": home, "LORA_LIBRARY_PATH": ""}
        call = [sys.executable, __file__, *map(str, words), str(checkout.resolve()), family or ""]
        subprocess.run(call, env=settings, check=True)


def of_family(name: str, family: str | None) -> bool:
    return not family or name.split()[0] == family


# ---- in this checkout: what is to be done


def write(folder: Path, _: Path, family: str) -> None:
    """Write models, LoRAs and source images into a folder, and `jobs.json`, whose paths are relative to it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from families.flux.cases_variants import write_pictures
    from support.cases import every

    write_pictures(folder)
    jobs = [
        demo(folder),
        {
            "name": "commands of all",
            "programs": True,
            "commands": overview(),
            "refused": {name: [name] for name in ("genrate", "train")},
        },
        depth_pro(folder),
    ]
    for name, tiny in [*every("TINY").items(), *more_models().items()]:
        if of_family(name, family):
            jobs.append(job(folder, name, tiny))
    (folder / "jobs.json").write_text(json.dumps([job for job in jobs if of_family(job["name"], family)], indent=1))


def more_models() -> dict[str, Any]:
    """What has no entry in `TINY`."""
    from functools import partial

    from families.fibo import cases as fibo
    from families.flux import cases as flux
    from families.flux import cases_variants as flux_variants
    from families.seedvr2 import cases as seedvr2
    from families.z_image import cases as z_image
    from support.cases import Tiny

    concept, variants = {"concept": "circle", "image_path": "photo.png"}, "mflux.models.flux.variants"
    models = [
        ("flux guided", partial(flux.write_tiny, guidance=True), "generate", "dev", (),
         f"{variants}.txt2img.flux:Flux1", {"guidance": 2.0}),
        ("flux concept-from-image", flux_variants.tiny(num_layers=3), "concept-from-image", "dev",
         ("--concept", "circle", "--input-image-path", "photo.png"),
         f"{variants}.concept_attention.flux_concept_from_image:Flux1ConceptFromImage", concept),
        ("fibo edit", fibo.write_tiny, "generate-fibo-edit", "fibo-edit", ("--image-path", "photo.png"),
         "mflux.models.fibo.variants.edit:FIBOEdit", {"image_path": "photo.png", "guidance": 5.0}),
        ("z_image controlnet", partial(z_image.write_tiny, controlnet=True), "generate-z-image-controlnet",
         "z-image-controlnet", ("--control", "canny:photo.png"), "", {}),
        *((f"seedvr2 {kind}", partial(seedvr2.write_tiny, kind=kind), "upscale-seedvr2", f"seedvr2-{kind}",
           ("--image-path", "photo.png", "--resolution", "32"), "mflux.models.seedvr2:SeedVR2",
           {"image_path": "photo.png", "resolution": 32}) for kind in ("3b", "7b")),
    ]  # fmt: skip
    fields = ("write", "command", "base_model", "words", "pipeline", "generate")
    prompts = {"fibo edit": json.dumps({"edit_instruction": "paint it red"})}
    return {
        name: Tiny(**dict(zip(fields, values, strict=True)), prompt=prompts.get(name, "a red circle"))
        for name, *values in models
    }


def job(folder: Path, name: str, tiny: Any) -> dict[str, Any]:
    """What is done with one tiny model."""
    stem = name.replace(" ", "-")
    narrow, wide, lora = f"{stem}-narrow", f"{stem}-wide", f"{stem}-lora.safetensors"
    tiny.write(folder / narrow)
    tiny.write(folder / wide, wide=True)

    def local(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [local(item) for item in value]
        if isinstance(value, Path):
            shutil.copy(value, folder)
            return value.name
        return value

    words, generate = local(tiny.words), {key: local(value) for key, value in tiny.generate.items()}
    with_lora, takes_prompt = [], tiny.command != "upscale-seedvr2"
    if takes_prompt:
        generate |= {"prompt": tiny.prompt} | SIZE
        words += ["--prompt", tiny.prompt, *SIZE_WORDS]
        write_lora(folder / wide / "transformer", folder / lora)
        with_lora = ["--lora", lora, "0.8"]
    model = ["--base-model", tiny.base_model, "--model"]
    call = [tiny.command, *words, "--seed", "5", *model]
    commands = {
        "plain": [
            *call,
            narrow,
            "--metadata",
            "--output",
            "OUT/{seed}.png",
            "--stepwise-image-output-dir",
            "OUT/steps",
        ],
        "from its settings": [*call, narrow, "-C", "OUT/../plain/5.png", "--output", "OUT/a.png"],
        "8 bits, LoRA": [*call, wide, "-q", "8", *with_lora, "--low-ram", "--output", "OUT/a.png"],
        "save": ["save", *model, wide, "-q", "4", "--path", "OUT/saved"],
        "drawn from what was saved": [*call, "OUT/../save/saved", "--output", "OUT/a.png"],
        "check": ["check", "model", narrow],
        "info": ["info", "OUT/../plain/5.metadata.json"],
    }
    refused = {
        "without a model": [tiny.command, *words, "--model", "nowhere/at-all"],
        "of another family": ["generate-z-image" if name.startswith("flux") else "generate", *model, narrow],
        "without an argument": [tiny.command],
        **{" ".join(more): [*call, narrow, *more] for more in _USAGE_ERRORS},
    }
    calls: dict[str, tuple] = {}
    if tiny.pipeline:
        calls = {"plain": (narrow, {}, generate, True), "8 bits": (wide, {"quantize": 8}, generate, True)}
        known = inspect.signature(tiny.pipeline_class().generate_image).parameters
        other = "flow_match_euler_discrete" if getattr(known.get("scheduler"), "default", 0) == "linear" else "linear"
        guided = {"guidance": 2.0, "negative_prompt": "a green square", "scheduler": other}
        calls["guided"] = (narrow, {}, generate | {key: guided[key] for key in guided if key in known}, False)
        if {"image_path", "image_strength"} <= known.keys() - generate.keys():
            calls["from an image"] = (narrow, {}, generate | {"image_path": "photo.png", "image_strength": 0.4}, False)
        if takes_prompt:
            loras = {"lora_paths": [lora], "lora_scales": [0.8]}
            calls["LoRA"] = (wide, loras, generate, True)
            calls["LoRA beside 8 bits"] = (wide, loras | {"bake_lora": False, "quantize": 8}, generate, False)
    return {
        "name": name, "class": tiny.pipeline, "base_model": tiny.base_model, "patches": dict(tiny.patches),
        "calls": calls, "commands": commands, "refused": refused,
    }  # fmt: skip


def write_lora(transformer: Path, path: Path) -> None:
    """A LoRA in PEFT's layout, strong enough to see, on every query of a transformer."""
    from mflux.backend import mx

    tensors = {}
    for name, weight in mx.load(str(next(transformer.glob("*.safetensors")))).items():
        if name.endswith(".to_q.weight"):
            layer, (rows, columns) = f"transformer.{name.removesuffix('.weight')}", weight.shape
            tensors[f"{layer}.lora_A.weight"] = mx.random.normal((2, columns), key=mx.random.key(len(tensors)))
            tensors[f"{layer}.lora_B.weight"] = mx.random.normal((rows, 2), key=mx.random.key(len(tensors)))
    assert tensors, transformer
    mx.save_safetensors(str(path), tensors)


def demo(folder: Path) -> dict[str, Any]:
    shutil.copy(ROOT / "tests" / "data" / "demo_square_lora.safetensors", folder)
    settings = {"prompt": "a large red circle on a white background"} | SIZE | {"height": 48}
    lora = {"lora_paths": ["demo_square_lora.safetensors"], "lora_scales": [0.8]}
    calls = {
        "plain": (None, {}, settings | {"num_inference_steps": 8, "width": 128, "height": 128}, True),
        "not square": (None, {}, settings, False),
        "from an image": (None, {}, settings | {"image_path": "photo.png", "image_strength": 0.4}, False),
        "8 bits": (None, {"quantize": 8}, settings, True),
        "LoRA": (None, lora, settings, True),
        "LoRA beside": (None, lora | {"bake_lora": False}, settings, False),
    }
    flux = "mflux.models.flux.variants.txt2img.flux:Flux1"
    command = ["generate", "--model", "demo", "--prompt", "a blue square", "--seed", "3", "4", "--output", "OUT/a.png"]
    return {"name": "demo", "class": flux, "base_model": "demo", "calls": calls, "commands": {"two seeds": command}}


def overview() -> dict[str, list[str]]:
    words = ("", "--help", "capabilities", "capabilities --format markdown",
             "lora-library list", "completions --print --shell bash", "completions --print --shell zsh")  # fmt: skip
    return {said or "nothing": said.split() for said in words}


def depth_pro(folder: Path) -> dict[str, Any]:
    from support.small_depth_pro import write_model

    write_model(folder / "depth-pro")
    call = ["save-depth", "--image-path", "photo.png", "--model", "depth-pro", "--output"]
    calls = {"png": [*call, "OUT/a.png"], "metres": [*call, "OUT/a.npy"], "8 bits": [*call, "OUT/b.png", "-q", "8"]}
    return {"name": "depth_pro", "commands": calls}


# ---- in either checkout: do it


def run(models: Path, target: Path, checkout: Path, family: str) -> None:
    """Do all of `jobs.json`, and write results by their names."""
    results: dict[str, Any] = {}
    os.chdir(models)
    with tempfile.TemporaryDirectory() as made:
        for job in json.loads(Path("jobs.json").read_text()):
            if of_family(job["name"], family):
                folder = Path(made).resolve() / job["name"]
                for key, value in [*programs(job, checkout), *calls(job, folder), *commands(job, folder)]:
                    results[f"{job['name']}: {key}"] = scrubbed(value, folder)
    target.write_text(json.dumps(results, indent=1))


def calls(job: dict[str, Any], root: Path) -> Iterator[tuple[str, Any]]:
    """Generate with the Python class; save, and generate again from what was saved."""
    for case, (model, options, settings, saved) in job.get("calls", {}).items():
        folder, found = root / case, []

        def call(case=case, model=model, options=options, settings=settings, saved=saved, folder=folder, found=found):
            found += generated(load(job, model, options), settings, folder / "image", case)
            if saved:
                load(job, model, options).save_model(str(folder / "saved"))
                found += files(folder / "saved", f"{case}: saved")
                again = load(job, str(folder / "saved"), {})
                found += generated(again, settings, folder / "again", f"{case}: from what was saved")

        yield from spoken(call, case)
        yield from found


def load(job: dict[str, Any], model: str | None, options: dict[str, Any]) -> Any:
    from mflux.models.common.config import ModelConfig

    module, _, name = job["class"].partition(":")
    make = getattr(importlib.import_module(module), name)
    patch(job.get("patches", {}))
    config = ModelConfig.from_name(model or job["base_model"], *([job["base_model"]] if model else []))
    if job["base_model"] == "demo":
        # A saved one has its own configuration; what it derives from has none of its own.
        config = ModelConfig.from_name("demo")
    return make(model_config=config, **({"model_path": model} if model else {}), **options)


def patch(patches: dict[str, Any]) -> None:
    """Set constants that would make a tiny case slow, by their names: the modules that hold them may have moved."""
    for name, value in patches.items():
        name = name.rpartition(".")[2]
        holders = [module for path, module in list(sys.modules.items()) if path.startswith("mflux.")]
        holders = [module for module in holders if name in vars(module)]
        if not holders:
            raise LookupError(f"no module has {name} any more: say in {Path(__file__).name} what took its place")
        for module in holders:
            setattr(module, name, value)


def generated(pipeline: Any, settings: dict[str, Any], folder: Path, case: str) -> Iterator[tuple[str, Any]]:
    import mlx.core as mx
    import numpy as np

    steps = []

    class Latents:
        def call_in_loop(self, t, latents, **_):
            steps.append((f"{case}: latents after step {t}", digest(np.array(latents.astype(mx.float32)).tobytes())))

    pipeline.callbacks.register(Latents())
    image = pipeline.generate_image(seed=5, **settings)
    folder.mkdir(parents=True)
    image.save(folder / "a.png", export_json_metadata=True)
    yield from steps
    yield from files(folder, case)


def commands(job: dict[str, Any], root: Path) -> Iterator[tuple[str, Any]]:
    from mflux.cli.main import main

    patch(job.get("patches", {}))
    for kind in ("commands", "refused"):
        for case, words in job.get(kind, {}).items():
            folder = root / kind / case
            folder.mkdir(parents=True)
            said = [word.replace("OUT", str(folder)) for word in words]
            yield from spoken(lambda said=said: main(said), f"{kind}, {case}")
            yield from files(folder, f"{kind}, {case}")


def programs(job: dict[str, Any], checkout: Path) -> Iterator[tuple[str, Any]]:
    """Every console script's help, version and refusal."""
    if job.get("programs"):
        scripts = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]["scripts"]
        for name, place in scripts.items():
            module, _, function = place.partition(":")
            for kind, word in (("commands", "--help"), ("commands", "--version"), ("refused", "--no-such-option")):
                sys.argv = [name, word]
                yield from spoken(getattr(importlib.import_module(module), function), f"{kind}, {name} {word}")


def spoken(call: Callable[[], int | None], case: str) -> Iterator[tuple[str, Any]]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = call()
        except SystemExit as end:
            status = end.code
        except Exception as error:
            status = f"{type(error).__name__}: {error}"
    # They hold the streams of the first call.
    logging.getLogger("mflux").handlers.clear()
    told = [line for line in err.getvalue().splitlines() if line.strip() and not _BAR.search(line)]
    yield f"{case}: status", status
    yield f"{case}: output", out.getvalue()
    yield f"{case}: errors", told


def files(folder: Path, case: str) -> Iterator[tuple[str, Any]]:
    """Every file: an image by its pixels and settings, settings one by one, anything else by its bytes."""
    import numpy as np
    import PIL.Image

    from mflux.utils.metadata_reader import MetadataReader

    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = f"{case}: {path.relative_to(folder)}"
        if path.suffix == ".png":
            with PIL.Image.open(path) as image:
                yield name, [image.mode, image.size, sorted(image.info), digest(np.asarray(image).tobytes())]
            about = MetadataReader.read_exif_metadata(path) or {}
        elif path.name == "mflux_model.json" or path.name.endswith(".metadata.json"):
            about = json.loads(path.read_text())
        else:
            yield name, digest(path.read_bytes())
            continue
        yield from ((f"{name}: {key}", value) for key, value in about.items() if key not in _OF_THE_RUN)


def scrubbed(value: Any, folder: Path) -> Any:
    """Without this run's folders and measurements, and the version of this checkout."""
    import mflux

    text = json.dumps(value, default=str).replace(mflux.__version__, "VERSION")
    text = text.replace(str(folder), "OUT").replace(os.environ["HF_HOME"], "HOME")
    return json.loads(_MEASURED.sub("N", text))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


if __name__ == "__main__":
    if sys.argv[1:2] in (["--write"], ["--run"]):
        do = write if sys.argv[1] == "--write" else run
        do(*map(Path, sys.argv[2:-1]), sys.argv[-1])
        sys.exit()
    sys.exit(main())

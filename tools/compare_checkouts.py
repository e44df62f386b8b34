"""Compare two checkouts of mflux: the pictures, latents and saved folders of FLUX.1 must be equal, bit for bit.

    git worktree add /tmp/before 52790b7
    python tools/compare_checkouts.py /tmp/before .          # in an environment with the core's dependencies

Each checkout draws in a process of its own, from the same models: the embedded one, and a guided one of random
weights that is written once. A picture's settings are compared one by one, without those that speak of the run;
everything else as bytes. What only the second has is told and is no difference. Ends with exit status 1 if anything
differs or is gone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LORA = ROOT / "tests" / "data" / "demo_square_lora.safetensors"
PROMPT = "a large red circle on a white background"
SIZE = {"num_inference_steps": 3, "width": 64, "height": 48}
# name: which model, the constructor's arguments, generate_image's.
CASES: dict[str, tuple[str, dict, dict]] = {
    "demo": ("demo", {}, {"num_inference_steps": 8, "width": 128, "height": 128}),
    "demo, not square": ("demo", {}, SIZE),
    "demo, from a picture": ("demo", {}, {**SIZE, "num_inference_steps": 5, "image_strength": 0.4}),
    "demo, 8 bits": ("demo", {"quantize": 8}, SIZE),
    "demo, LoRA": ("demo", {"lora_paths": [str(LORA)], "lora_scales": [0.8]}, SIZE),
    "demo, LoRA beside the weights": ("demo", {"lora_paths": [str(LORA)], "bake_lora": False}, SIZE),
    "guided": ("guided", {}, {**SIZE, "guidance": 2.0}),
    "guided, from a picture": ("guided", {}, {**SIZE, "image_strength": 0.4}),
    "guided, 4 bits": ("guided", {"quantize": 4}, SIZE),
}
# Which of them are saved, and drawn once more from what was saved.
SAVED = ("demo", "demo, 8 bits", "demo, LoRA", "guided", "guided, 4 bits")
# Settings that speak of the run and not of the picture.
_OF_THE_RUN = ("created_at", "generation_time", "generation_time_seconds", "mflux_version", "version", "model")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--draw", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw:
        draw(*args.draw)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        # In the folder that both see, so that the settings say the same of it.
        models = Path(folder) / "models"
        results = []
        write_guided(models / "guided", args.after)
        for name, checkout in (("before", args.before), ("after", args.after)):
            call = [sys.executable, __file__, ".", ".", "--draw", models, Path(folder) / name]
            subprocess.run([str(word) for word in call], env=environment(checkout), check=True)
            results.append(json.loads((Path(folder) / name / "result.json").read_text()))
    before, after = results
    equal = [name for name in before if name in after and before[name] == after[name]]
    for name in sorted(before.keys() | after.keys()):
        what = "new" if name not in before else "gone" if name not in after else "differs"
        if name in equal:
            print(f"{'equal':8} {name}")
        else:
            print(f"{what:8} {name}: {before.get(name)!r} -> {after.get(name)!r}")
    print(f"{len(equal)} of {len(before)} equal, {len(after.keys() - before.keys())} new")
    return 0 if len(equal) == len(before) else 1


def environment(checkout: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(checkout.resolve() / "src"), "HF_HUB_OFFLINE": "1"}


def write_guided(folder: Path, checkout: Path) -> None:
    code = "import sys; from pathlib import Path; from support.tiny import write_checkpoint; "
    code += "write_checkpoint(Path(sys.argv[1]), guidance=True, seed=7)"
    settings = environment(checkout)
    settings["PYTHONPATH"] += os.pathsep + str(ROOT / "tests")
    subprocess.run([sys.executable, "-c", code, str(folder)], env=settings, check=True)


def draw(models: Path, target: Path) -> None:
    """In a checkout's own process: draw every case, save some, and note a sum of each result."""
    import numpy as np
    import PIL.Image

    from mflux.models.common.config import ModelConfig
    from mflux.models.flux.variants.txt2img.flux import Flux1

    target.mkdir()
    source = models / "source.png"
    if not source.exists():
        pixels = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(source)
    sums: dict[str, object] = {}

    class Latents:
        def call_in_loop(self, t, latents, **_):
            sums[f"{name}: latents after step {t}"] = digest(np.array(latents).tobytes())

    def make(model: str, path: Path | None, **options):
        if model == "demo" and path is None:
            flux = Flux1(model_config=ModelConfig.from_name("demo"), **options)
        else:
            base = "schnell" if model == "demo" else "dev"
            config = ModelConfig.from_name(str(path or models / model), base_model=base)
            config.max_sequence_length = ModelConfig.from_name("demo").max_sequence_length
            flux = Flux1(model_path=str(path or models / model), model_config=config, **options)
        flux.callbacks.register(Latents())
        return flux

    def note(flux, settings) -> None:
        if "image_strength" in settings:
            settings = settings | {"image_path": str(source)}
        image = flux.generate_image(seed=5, prompt=PROMPT, **settings)
        sums[f"{name}: picture"] = digest(np.asarray(image.image).tobytes())
        path = target / f"{name}.png"
        image.save(path, export_json_metadata=True)
        about = json.loads(path.with_suffix(".metadata.json").read_text())
        sums.update({f"{name}: setting {key}": named(value) for key, value in about.items() if key not in _OF_THE_RUN})

    for case, (model, options, settings) in CASES.items():
        name = case
        note(make(model, None, **options), settings)
        if case in SAVED:
            folder = target / f"{case}, saved"
            make(model, None, **options).save_model(str(folder))
            for file in sorted(
                path for path in folder.rglob("*") if path.is_file() and path.name != "mflux_model.json"
            ):
                sums[f"{case}: saved {file.relative_to(folder)}"] = digest(file.read_bytes())
            name = f"{case}, from what was saved"
            note(make(model, folder), settings)
    (target / "result.json").write_text(json.dumps(sums))


def named(value: object) -> object:
    """A path by its last part: settings once named this machine's folders, and no longer do."""
    if isinstance(value, list):
        return [named(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    sys.exit(main())

"""The memory of every stage of every family: of the published models on paper, and measured on smaller ones.

    python benchmarks/stage_memory.py [FAMILY …] [--size 256] [--paper] [--markdown FILE]

On paper: each component's own module is built from the published configuration, without computing anything, and its
parameters are counted, in 16 bits and quantized as `-q` would (layers that keep more bits, or are not quantized,
included). Which configuration belongs to which module is what the parity tests say (`tests/families`).

Measured: a model of random weights in the published layout, some hundred megabytes of it, draws a picture of SIZE x
SIZE pixels in one step, as a command does, in a process of its own. The figures are MLX's own counters: what arrays
take, without the interpreter. MLX's CPU backend computes in float32, a GPU in the file's 16 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
CONFIGS = json.loads((ROOT / "tests" / "data" / "surface" / "configs.json").read_text())
BITS = (8, 4)

# Family → component → what makes the tests' smallest model larger.
_QWEN3 = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "num_key_value_heads": 2}
_IDEOGRAM = {
    "num_attention_heads": 6, "num_layers": 4, "intermediate_size": 4096, "llm_features_dim": 13 * 512,
}  # fmt: skip
_KL = {"block_out_channels": [64, 128, 256, 256], "norm_num_groups": 32, "layers_per_block": 2}
_MMDIT = {"num_attention_heads": 8, "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}
LARGER = {
    "flux": {
        "text_encoder_2": {"d_model": 1024, "d_ff": 2816, "d_kv": 64, "num_heads": 16, "num_layers": 8},
        "transformer": {"joint_attention_dim": 1024, "num_layers": 2, "num_single_layers": 4, **_MMDIT},
        "vae": _KL,
    },
    "flux2": {
        "text_encoder": {
            "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 128,
        },
        "transformer": {
            "joint_attention_dim": 1536, "num_layers": 2, "num_single_layers": 4, **_MMDIT,
            "axes_dims_rope": [32, 32, 32, 32],
        },
        "vae": _KL,
    },
    "flux3": {
        "transformer": {"num_layers": 1, "num_single_layers": 6, **_MMDIT,
                        "axes_dims_rope": [32, 32, 32, 32]},
        "vae": _KL,
    },
    "anima": {
        "text_encoder": {**_QWEN3, "num_hidden_layers": 8},
        "text_conditioner": {"source_dim": 1024, "target_dim": 1024, "model_dim": 1024, "num_layers": 2},
        "transformer": {
            "num_attention_heads": 8, "attention_head_dim": 128, "num_layers": 4, "text_embed_dim": 1024,
            "adaln_lora_dim": 256,
        },
        "vae": {"base_dim": 64, "dim_mult": [1, 2, 4, 4]},
    },
    "qwen": {
        "text_encoder": {
            "text_config": {
                **_QWEN3, "num_hidden_layers": 8, "rope_scaling": {"mrope_section": [16, 24, 24], "type": "default"},
            },
            "vision_config": {
                "depth": 4, "hidden_size": 640, "intermediate_size": 1280, "num_heads": 8, "out_hidden_size": 1024,
                "fullatt_block_indexes": [3],
            },
        },
        "transformer": {"joint_attention_dim": 1024, "num_layers": 4, **_MMDIT},
        "vae": {"base_dim": 64, "dim_mult": [1, 2, 4, 4]},
    },
    "fibo": {
        "text_encoder": {**_QWEN3, "num_hidden_layers": 8},
        "transformer": {
            "text_encoder_dim": 1024, "joint_attention_dim": 2048, "num_layers": 2, "num_single_layers": 4, **_MMDIT,
        },
        "vae": {"base_dim": 48, "decoder_base_dim": 64, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2},
    },
    "z_image": {
        "text_encoder": {**_QWEN3, "num_hidden_layers": 9, "head_dim": 128},
        "transformer": {
            "dim": 1536, "n_heads": 12, "n_kv_heads": 12, "axes_dims": [32, 48, 48], "n_layers": 4,
            "cap_feat_dim": 1024,
        },
        "vae": _KL,
    },
    "krea2": {
        "text_encoder": {
            "text_config": {
                "model_type": "qwen3_vl_text", **_QWEN3, "num_hidden_layers": 9, "head_dim": 128,
                "rope_scaling": {"mrope_section": [24, 20, 20], "rope_type": "default"},
            },
        },
        "transformer": {
            "attention_head_dim": 128, "num_attention_heads": 12, "num_key_value_heads": 3, "num_layers": 4,
            "intermediate_size": 4096, "text_hidden_dim": 1024, "text_num_attention_heads": 8,
            "text_num_key_value_heads": 8, "text_intermediate_size": 2816, "axes_dims_rope": [32, 48, 48],
        },
        "controlnet": {"width": 1536, "key_width": 384, "hidden": 4096, "num_layers": 4},
        "vae": {"base_dim": 64, "dim_mult": [1, 2, 4, 4]},
    },
    "ernie_image": {
        "text_encoder": {
            "text_config": {"model_type": "mistral", **_QWEN3, "num_hidden_layers": 9, "head_dim": 128},
        },
        "transformer": {
            "hidden_size": 1536, "num_attention_heads": 12, "rope_axes_dim": [32, 48, 48], "num_layers": 4,
            "ffn_hidden_size": 4608, "text_in_dim": 1024,
        },
        "vae": _KL,
    },
    "ideogram4": {
        "text_encoder": {"text_config": {"model_type": "qwen3_vl_text", **_QWEN3 | {
            "num_hidden_layers": 36, "hidden_size": 512, "intermediate_size": 1024,
        }}},
        "transformer": _IDEOGRAM,
        "unconditional_transformer": _IDEOGRAM,
        "vae": _KL,
    },
}  # fmt: skip


# ---- on paper


def stages_of(family) -> dict[type, str]:
    """The stage of each class of component that a family's pipelines have."""
    from mflux.models.common.family import load_object

    components = list(family.components)
    for reference in family.pipelines:
        components += load_object(reference).components
    return {component.module_class(): component.stage for component in components}


def on_paper(name: str) -> Iterator[tuple[str, ...]]:
    """Rows of the table: published component, stage, parameters that are loaded, GB in 16 bits, and quantized."""
    from support.cases import case_modules

    from mflux.backend import tree_flatten
    from mflux.checkpoints.late import late_layers
    from mflux.models.common.family import families
    from mflux.models.common.footprint import weights

    stages = stages_of(families()[name])
    # SeedVR2's tests go another way; what it takes stands in seedvr2.md.
    tables = [getattr(module, "COMPONENTS", ()) for module in case_modules(name)]
    for case in (case for table in tables for case in table):
        # A pipeline may load less of a component than its largest form.
        loaded = [kind for kind in stages if issubclass(case.module, kind) or issubclass(kind, case.module)]
        for key in case.published:
            for kind in loaded if case.module in loaded else [*loaded, case.module]:
                module = kind(kind.config_class.from_dict(CONFIGS[key]))
                size = sum(value.size for _, value in tree_flatten(module.parameters()))
                late = sum(
                    value.size for layer in late_layers(module).values() for value in layer.parameters().values()
                )
                stage = stages[loaded[0]] if loaded else ""
                cells = [f"{weights(module, bits, late=bool(late)) / 1e9:.1f}" for bits in (None, *BITS)]
                yield f"{key} ({kind.__name__})", stage, f"{(size - late) / 1e9:.2f}", *cells
                if late:
                    read = [f"{2 * late / 1e9:.1f}"] * len(cells)
                    yield f"{key}, modulation", "before the steps", f"{late / 1e9:.2f}", *read


# ---- measured


def enlarge(folder: Path, name: str) -> None:
    """Give the components of the tests' smallest model other sizes, and weights of these."""
    from support.tiny import published, write_json

    from mflux.backend import mx
    from mflux.models.common.family import families, load_object

    parts = list(families()[name].components)
    for reference in families()[name].pipelines:
        parts += [
            part for part in load_object(reference).components if part.folder not in {one.folder for one in parts}
        ]
    for number, component in enumerate(parts):
        changes = LARGER[name].get(component.folder)
        if changes is None or not (folder / component.folder).is_dir():
            continue
        path = folder / component.folder / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            config[key] = (
                config[key] | value if isinstance(value, dict) and isinstance(config.get(key), dict) else value
            )
        write_json(path, config)
        kind = component.module_class()
        module = getattr(kind, "saved_class", kind)(kind.config_class.from_dict(config))
        tensors = published(module, seed=number, dtype=mx.bfloat16)
        for key in tensors:
            if key.endswith("running_var"):
                tensors[key] = mx.abs(tensors[key]) + 0.5
        for file in path.parent.glob("*.safetensors"):
            file.unlink()
        mx.save_safetensors(str(path.parent / f"{component.stem}.safetensors"), tensors, metadata={"format": "pt"})
        del tensors, module
        mx.clear_cache()


def distinct(name: str) -> dict[str, object]:
    """A family's smallest models by command, one for each set of components."""
    import importlib

    kept = {}
    for tiny in importlib.import_module(f"families.{name}.cases").TINY:
        kept.setdefault(tuple(component.module for component in tiny.pipeline_class().components), tiny)
    return {tiny.command: tiny for tiny in kept.values()}


def patched(path: str, value: object) -> None:
    """Set what stands at "module.name"."""
    import importlib

    module, _, name = path.rpartition(".")
    setattr(importlib.import_module(module), name, value)


def draw(name: str, command: str, folder: Path, size: int, bits: int | None) -> list[dict]:
    """One picture, as a command draws it; for each component, bytes beside what was held when all began."""
    from mflux.backend import mx
    from mflux.models.common import memory
    from mflux.models.common.config import ModelConfig

    tiny = distinct(name)[command]
    for path, value in tiny.patches.items():
        patched(path, value)
    config = ModelConfig.from_name(str(folder), tiny.base_model)
    pipeline = tiny.pipeline_class()(model_path=str(folder), model_config=config, quantize=bits)
    pipeline.keep = memory.Keep(transformer=False, for_next_image=False)
    start = mx.get_active_memory()
    found: list[dict] = []
    real, weigh, weights = memory.timed, memory.weight_bytes, []

    @contextmanager
    def watched(what: str):
        if what.startswith("decode"):
            # Its autoencoder is loaded within.
            with real(what) as note:
                yield note
            return
        if found:
            found[-1]["work"] = mx.get_peak_memory() - start
        mx.reset_peak_memory()
        before = mx.get_active_memory() - start
        with real(what) as note:
            yield note
        found.append(
            {
                "component": "modulation, and the steps" if "modulation" in what else what.removeprefix("load "),
                "before": before,
                # What the modulation reads is gone by now.
                "weights": weights.pop() if weights else mx.get_active_memory() - start - before,
                "load": mx.get_peak_memory() - start,
            }
        )
        mx.reset_peak_memory()

    memory.timed = watched
    patched("mflux.models.common.pipeline.timed", watched)
    memory.weight_bytes = lambda module: weights.append(weigh(module)) or weights[-1]
    settings = {"num_inference_steps": 1, "width": size, "height": size} | dict(tiny.generate)
    pipeline.generate_image(seed=1, prompt=tiny.prompt, **settings)
    found[-1]["work"] = mx.get_peak_memory() - start
    return found


def measured(name: str, command: str, folder: Path, size: int) -> Iterator[tuple[str, ...]]:
    """Rows of the table, MB: run, component, held before, weights, peak while it loads, peak while it works."""
    for bits in (None, *BITS):
        call = [sys.executable, __file__, "--child", name, command, str(folder), str(size), str(bits or 0)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "MFLUX_PROMPT_CACHE": "0"}
        done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(call)} failed:\n{done.stderr}")
        for stage in json.loads(done.stdout.splitlines()[-1]):
            cells = [f"{stage[key] / 1e6:,.0f}" for key in ("before", "weights", "load", "work")]
            yield f"{command} -q {bits}" if bits else command, stage["component"], *cells


# ---- the tables


def table(heads: str, rows: Iterator[tuple[str, ...]]) -> list[str]:
    count = len(heads.split("|"))
    return [f"| {heads} |", f"|---|---|{'---:|' * (count - 2)}", *(f"| {' | '.join(row)} |" for row in rows)]


def report(names: list[str], size: int, paper: bool) -> str:
    lines = table(
        "published component | stage | billions of parameters loaded | GB in 16 bits | -q 8 | -q 4",
        (row for name in names for row in on_paper(name)),
    )
    if paper:
        return "\n".join(lines) + "\n"
    lines += ["", f"Measured on smaller models, {size} x {size} pixels, MB:", ""]

    def rows() -> Iterator[tuple[str, ...]]:
        for name in names:
            for command, tiny in (distinct(name) if name in LARGER else {}).items():
                with tempfile.TemporaryDirectory() as folder:
                    tiny.write(Path(folder), wide=True)
                    enlarge(Path(folder), name)
                    yield from measured(name, command, Path(folder), size)

    heads = "command | component | held before | weights | peak while it loads | peak while it works"
    return "\n".join([*lines, *table(heads, rows())]) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        name, command, folder, size, bits = sys.argv[2:]
        print(json.dumps(draw(name, command, Path(folder), int(size), int(bits) or None)))
        return
    from mflux.models.common.family import families

    known = [name for name, family in families().items() if family.pipelines]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side of the picture (default: 256)")
    parser.add_argument("--paper", action="store_true", help="measure nothing")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    if unknown := set(args.families) - set(known):
        parser.error(f"there is no family {min(unknown)}: {', '.join(known)}")
    text = report(args.families or known, args.size, args.paper)
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

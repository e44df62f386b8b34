"""Make tests/data/mflux_024.tar.xz: a reduced FLUX.1 as mflux 0.24.0's own code saves it, in 4 bits to keep it small.

    python -m venv /tmp/old && /tmp/old/bin/pip install mflux==0.24.0
    python tools/fixture_024.py --old-python /tmp/old/bin/python
    python tools/fixture_024.py --old-python /tmp/old/bin/python --all /tmp/all.tar.xz
    MFLUX_024_ARCHIVE=/tmp/all.tar.xz pytest tests/core/files/test_saved_by_024.py      # whole, and in 3 to 8 bits

mflux 0.24.0 runs in an environment of its own: this script starts itself there. Its modules have FLUX.1's sizes written
into them; they are made here with fewer blocks, and take the reduced arrays for theirs because nothing is computed.
Names, mapping, quantization, shards and tokenizers are 0.24's own doing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = ROOT / "tests" / "data" / "mflux_024.tar.xz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--old-python", required=True, help="the Python of an environment with mflux 0.24.0")
    parser.add_argument("--all", type=Path, metavar="FILE", help="whole and in all bits, to this file")
    parser.add_argument("--save", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.save:
        source, saved, *names = args.save
        for name in names:
            save_with_024(Path(source), Path(saved) / name, None if name == "whole" else int(name.removeprefix("q")))
        return
    sys.path.insert(0, str(ROOT / "tests"))
    from support.saved_024 import write_source

    with tempfile.TemporaryDirectory() as folder:
        source = write_source(Path(folder) / "source")
        saved = Path(folder) / "saved"
        names = ["whole", "q3", "q4", "q5", "q6", "q8"] if args.all else ["q4"]
        call = [args.old_python, __file__, "--old-python", args.old_python, "--save", source, saved, *names]
        subprocess.run([str(word) for word in call], check=True)
        with tarfile.open(args.all or ARCHIVE, "w:xz", preset=9) as archive:
            # By file name, so that what is alike stands side by side.
            files = [path for path in saved.rglob("*") if path.is_file()]
            for path in sorted(files, key=lambda path: (path.parts[-2:], path)):
                archive.add(path, path.relative_to(saved), filter=_nobody)
    print(args.all or ARCHIVE)


def _nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def save_with_024(source: Path, destination: Path, bits: int | None) -> None:
    """Load the source as 0.24 does, with what stands in for its classes' fixed sizes, and save it as it does."""
    from types import SimpleNamespace

    import mlx.core as mx  # 0.24.0 and all that follows is its own: mflux here is not this project
    from mflux.models.common.tokenizer import TokenizerLoader
    from mflux.models.common.weights.loading.loaded_weights import LoadedWeights, MetaData
    from mflux.models.common.weights.loading.weight_applier import WeightApplier
    from mflux.models.common.weights.loading.weight_loader import WeightLoader
    from mflux.models.common.weights.mapping.weight_mapper import WeightMapper
    from mflux.models.common.weights.saving.model_saver import ModelSaver
    from mflux.models.flux.model.flux_text_encoder.clip_encoder.clip_encoder import CLIPEncoder
    from mflux.models.flux.model.flux_text_encoder.t5_encoder.t5_encoder import T5Encoder
    from mflux.models.flux.model.flux_transformer.transformer import Transformer
    from mflux.models.flux.model.flux_vae.vae import VAE
    from mflux.models.flux.weights.flux_weight_definition import FluxWeightDefinition

    from mflux.models.common.config.model_config import ModelConfig

    t5, clip = T5Encoder(), CLIPEncoder()
    t5.t5_blocks = t5.t5_blocks[:2]
    clip.text_model.encoder.layers = clip.text_model.encoder.layers[:2]
    models = {
        "vae": VAE(), "transformer": Transformer(ModelConfig.dev(), 1, 1), "t5_encoder": t5, "clip_encoder": clip
    }  # fmt: skip
    components = {}
    for part in FluxWeightDefinition.get_components():
        raw = WeightLoader._load_safetensors(source / part.hf_subdir, part.loading_mode, part.weight_files)
        raw = WeightLoader._convert_precision(raw, mx.bfloat16)
        blocks = 2 if part.name == "t5_encoder" else part.num_blocks
        components[part.name] = WeightMapper.apply_mapping(raw, part.mapping_getter(), blocks, part.num_layers)
    weights = LoadedWeights(components=components, meta_data=MetaData(quantization_level=None, mflux_version=None))
    WeightApplier.apply_and_quantize(
        weights=weights, models=models, quantize_arg=bits, weight_definition=FluxWeightDefinition
    )
    model = SimpleNamespace(
        vae=models["vae"],
        transformer=models["transformer"],
        t5_text_encoder=t5,
        clip_text_encoder=clip,
        tokenizers=TokenizerLoader.load_all(FluxWeightDefinition.get_tokenizers(), str(source)),
    )
    ModelSaver.save_model(model, bits, str(destination), FluxWeightDefinition)


if __name__ == "__main__":
    main()

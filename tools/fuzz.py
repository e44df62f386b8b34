"""Give every reader changed files for a while, and see that each is read or refused with a sentence.

    python tools/fuzz.py [--seconds 300] [--seed N] [--reader NAME …] [--finds FOLDER]
    python tools/fuzz.py --replay FOLDER/FIND

Whatever is neither is a find: an exception that is no `MfluxError`, a message that is not one line fit for a terminal,
a process that ends, a case that takes long. Its files are kept in the folder of finds with what happened, and
`--replay` reads them once more. The cases follow from the seed, which is printed; each reader has its share of the
time, in processes of its own, so that what kills one is seen from outside. Exit status 1: there were finds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ["HF_HUB_OFFLINE"] = "1"

from support import mutations  # noqa: E402

# Of one case. A process gets so much address space beyond what it begins with.
SLOW_S, HANGS_S, MEMORY = 20.0, 60.0, 4 << 30
LONGEST_MESSAGE = 3000
ACCEPTED, REFUSED, FIND = b"a", b"r", b"f"


@dataclass(frozen=True)
class Reader:
    """What is to be read.

    Attributes:
        write: sound files into a folder.
        read: reads them.
        changed: globs of the files of which one is changed.
        change: how; by the ending of its name where nothing is said.
    """

    write: Callable[[Path], object]
    read: Callable[[Path], object]
    changed: tuple[str, ...]
    change: Callable[[bytes, random.Random], bytes] | None = None


def by_ending(path: Path) -> Callable[[bytes, random.Random], bytes]:
    kinds = {
        ".json": mutations.mutated_json,
        ".safetensors": mutations.mutated_safetensors,
        ".png": mutations.mutated_png,
    }
    return kinds.get(path.suffix, mutations.mutated)


# ---- readers


def weights(folder: Path) -> None:
    from mflux.backend import mx

    kinds = (mx.float32, mx.float16, mx.bfloat16, mx.int64, mx.uint8, mx.bool_, mx.complex64)
    tensors = {f"block.{number}.weight": mx.ones((3, 2)).astype(kind) for number, kind in enumerate(kinds)}
    mx.save_safetensors(str(folder / "a.safetensors"), tensors | {"none": mx.zeros((0, 2))}, {"format": "pt"})
    header = json.dumps(
        {
            "wide": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]},
            "small": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [16, 20]},
            "half": {"dtype": "BF16", "shape": [2], "data_offsets": [20, 24]},
        }
    ).encode()
    (folder / "b.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    index = {"metadata": {"total_size": 9}, "weight_map": dict.fromkeys(tensors, "a.safetensors")}
    index["weight_map"] |= dict.fromkeys(("wide", "small", "half"), "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_weights(folder: Path) -> None:
    from mflux.backend import mx
    from mflux.checkpoints.loading import FolderTensors

    tensors = FolderTensors(folder)
    for name in tensors:
        mx.eval(tensors[name])


def gguf_file(folder: Path) -> None:
    import numpy as np
    from support.gguf_files import f32, q8_0, random_blocks, write_gguf

    values = np.arange(256, dtype=np.float32).reshape(4, 64)
    kinds = ("Q4_K", "Q6_K", "Q2_K", "IQ4_XS", "MXFP4", "NVFP4")
    tensors = {f"{kind}.weight": random_blocks(kind, (2, 256)) for kind in kinds}
    said = {"general.name": "x", "list": ("i32", [1, 2]), "comfy.gguf.orig_shape.b": ("i32", [2, 128])}
    write_gguf(folder / "x.gguf", tensors | {"a.weight": q8_0(values), "b": f32(values)}, said)


def read_gguf(folder: Path) -> None:
    from mflux.backend import mx
    from mflux.checkpoints.loading import FolderTensors

    for packs in (True, False):
        tensors = FolderTensors(folder, [folder / "x.gguf"], packs=packs)
        for name in tensors:
            tensors.spec(name)
            mx.eval(tensors[name])


def stored_files(folder: Path) -> None:
    from core.files.test_stored import KINDS

    from mflux.backend import mx

    every: dict[str, mx.array] = {}
    for number, (make, options) in enumerate(KINDS.values()):
        small = {"shape": (2, 128)} if "scales" not in options else {}
        tensors, _ = make(**options, **small)
        every |= {name.replace("layer", f"layer{number}"): value for name, value in tensors.items()}
    mx.save_safetensors(str(folder / "x.safetensors"), every)


def torch_file(folder: Path, *, old: bool) -> None:
    from core.files.test_pytorch_reader_hostile import a_file_of_everything

    (folder / "x.pt").write_bytes(a_file_of_everything(old))


def torch_stream(folder: Path) -> None:
    from core.files.test_pytorch_reader_hostile import STREAM

    (folder / "stream").write_bytes(STREAM)


def read_torch(folder: Path) -> None:
    from mflux.checkpoints.readers.opening import open_checkpoint

    checkpoint = open_checkpoint(folder / "x.pt")
    for name in checkpoint:
        checkpoint.describe(name)
        checkpoint[name].tolist()


def read_torch_stream(folder: Path) -> None:
    from core.files.test_pytorch_reader_hostile import STORAGES
    from support.torch_archives import archive, save

    save(folder / "x.pt", archive((folder / "stream").read_bytes(), STORAGES))
    read_torch(folder)


def lora(folder: Path) -> None:
    from mflux.backend import mx

    settings = {"r": 2, "lora_alpha": 4, "alpha_pattern": {r"lay\w+": 3}, "rank_pattern": {}, "use_rslora": False}
    peft = {"layer.lora_A.weight": mx.ones((2, 4)), "layer.lora_B.weight": mx.ones((4, 2)), "layer.alpha": mx.ones(())}
    text = json.dumps(settings)
    mx.save_safetensors(str(folder / "peft.safetensors"), peft, {"lora_adapter_metadata": text})
    kohya = {
        "layer.lora_down.weight": mx.ones((2, 4)), "layer.lora_up.weight": mx.ones((4, 2)),
        "layer.alpha": mx.array(2.0), "layer.diff_b": mx.ones(4), "norm.diff": mx.ones(4),
    }  # fmt: skip
    mx.save_safetensors(str(folder / "kohya.safetensors"), kohya)
    lokr = {"layer.lokr_w1": mx.ones((2, 2)), "layer.lokr_w2_a": mx.ones((2, 1)), "layer.lokr_w2_b": mx.ones((1, 2))}
    mx.save_safetensors(str(folder / "lokr.safetensors"), lokr)
    (folder / "settings").mkdir()
    shutil.copy(folder / "kohya.safetensors", folder / "settings" / "adapter_model.safetensors")
    (folder / "settings" / "adapter_config.json").write_text(text)


def read_loras(folder: Path) -> None:
    from mflux.backend import mx
    from mflux.models.common.lora.reading import Target, read_lora

    names = {name: Target("transformer", ((name, None),), (4, 4)) for name in ("layer", "other")}
    names["norm"] = Target("transformer", (("norm", None),), (4,))
    failure = None
    for path in (*sorted(folder.glob("*.safetensors")), folder / "settings" / "adapter_model.safetensors"):
        try:
            for adapter in read_lora(path, 1.0, names, {}).values():
                mx.eval([read() for read in (adapter.read, adapter.read_bias) if read is not None])
        except Exception as error:
            failure = failure or error
            if not _is_ours(error):
                raise
    if failure is not None:
        raise failure


def _is_ours(error: BaseException) -> bool:
    from mflux.errors import MfluxError

    return isinstance(error, MfluxError)


def components(folder: Path) -> None:
    """One folder for each component of each family, and for what stands without one."""
    from core.files.test_hostile_configs import COMPONENTS, tensors_of
    from support.cases import every

    from mflux.backend import mx
    from mflux.models.common.config.model_config import key_of
    from mflux.models.common.family import family_of

    with tempfile.TemporaryDirectory() as scratch:
        for number, tiny in enumerate(every("TINY").values()):
            for path, value in tiny.patches.items():
                _patch(path, value)
            root = tiny.write(Path(scratch, str(number)), wide=False)
            for part in family_of(key_of(tiny.base_model)).components:
                if (root / part.folder / "config.json").is_file():
                    shutil.copytree(root / part.folder, folder / f"{number}-{part.folder}")
                    (folder / f"{number}-{part.folder}" / "class").write_text(part.module)
    for module_class, values in COMPONENTS.items():
        part = folder / module_class.__name__
        part.mkdir()
        (part / "config.json").write_text(json.dumps(values))
        (part / "class").write_text(f"{module_class.__module__}:{module_class.__name__}")
        mx.save_safetensors(str(part / "model.safetensors"), tensors_of(module_class, values))


def changed_first(folder: Path) -> list[str]:
    """The entry that was changed, or holds what was, as a note says; all of them where nothing was."""
    note = folder / "changed"
    return [Path(note.read_text()).parts[0]] if note.is_file() else sorted(path.name for path in folder.iterdir())


def read_component(folder: Path) -> None:
    from mflux.checkpoints.loading import load_component
    from mflux.models.common.family import load_object

    for name in changed_first(folder):
        path = folder / name
        load_component(load_object((path / "class").read_text()), path, read=False)


def _patch(path: str, value: object) -> None:
    import importlib

    module, _, name = path.rpartition(".")
    setattr(importlib.import_module(module), name, value)


def models(folder: Path) -> None:
    """Each family's tiny model, and one that mflux 0.24 saved."""
    from support.cases import every

    for number, tiny in enumerate(every("TINY").values()):
        for path, value in tiny.patches.items():
            _patch(path, value)
        root = tiny.write(folder / f"{number}", wide=False)
        (root / "mflux_model.json").write_text(json.dumps({"base_model": tiny.base_model, "format_version": 1}))
    with tarfile.open(ROOT / "tests" / "data" / "mflux_024.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    for path in list(folder.iterdir()):
        if not path.name.isdecimal():
            (path / "mflux_model.json").write_text(json.dumps({"base_model": "schnell"}))


def read_model(folder: Path) -> None:
    """The one that was changed, without its numbers: configurations, indexes, headers, schedules, tokenizers."""
    from mflux.models.common.checking import check_model
    from mflux.models.common.saved_model import recorded_base_model

    names = changed_first(folder)
    for name in names:
        recorded_base_model(str(folder / name))
        report = check_model(str(folder / name), "schnell" if not name.isdecimal() else None)
        if not report.passed:
            from mflux.errors import CheckpointError

            raise CheckpointError((report.problems or ["broken"])[0])


def drawings(folder: Path) -> None:
    """Each family's tiny model with what its command needs, SeedVR2's, and the two networks that stand alone."""
    from core.files.test_hostile_configs import COMPONENTS, tensors_of
    from families.seedvr2.cases import write_tiny as write_seedvr2
    from support.cases import every
    from support.small_depth_pro import write_model as write_depth_pro

    from mflux.backend import mx
    from mflux.models.common.networks.qwen3_vl import Qwen3VLForConditionalGeneration

    for name, tiny in every("TINY").items():
        target = folder / name.replace(" ", "+")
        tiny.write(target, wide=False)
        if tiny.pictures is not None:
            tiny.pictures(target)
    for kind in ("3b", "7b"):
        write_seedvr2(folder / f"seedvr2-{kind}", kind=kind)
    write_depth_pro(folder / "depth-pro")
    values = COMPONENTS[Qwen3VLForConditionalGeneration]
    (folder / "vlm").mkdir()
    (folder / "vlm" / "config.json").write_text(json.dumps(values))
    (folder / "vlm" / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    tensors = tensors_of(Qwen3VLForConditionalGeneration, values)
    mx.save_safetensors(str(folder / "vlm" / "model.safetensors"), tensors, {"format": "pt"})


def draw(folder: Path) -> None:
    """One step with the model that was changed: MLX does not look whether what is read from a table lies in it."""
    import PIL.Image
    from support.cases import every

    from mflux.models.common.config import ModelConfig

    photo = PIL.Image.linear_gradient("L").resize((48, 32)).convert("RGB")
    tiny_models, before = every("TINY"), Path.cwd()
    for name in changed_first(folder):
        path = folder / name
        os.chdir(path)
        try:
            if name == "depth-pro":
                from mflux.models.common.controls.depth_pro.depth_pro import DepthPro

                DepthPro(model_path=path).depth_of(photo)
            elif name == "vlm":
                answer(path, photo)
            elif name.startswith("seedvr2"):
                from mflux.models.seedvr2.variants.upscale.seedvr2 import SeedVR2

                photo.save("photo.png")
                config = ModelConfig.from_name(str(path), name)
                SeedVR2(model_path=str(path), model_config=config).generate_image(1, "photo.png", 32)
                Path("photo.png").unlink()
            else:
                tiny = tiny_models[name.replace("+", " ")]
                for place, value in tiny.patches.items():
                    _patch(place, value)
                config = ModelConfig.from_name(str(path), tiny.base_model)
                plain = {"seed": 1, "prompt": tiny.prompt, "num_inference_steps": 1, "width": 64, "height": 32}
                pipeline = tiny.pipeline_class()(model_path=str(path), model_config=config)
                pipeline.generate_image(**plain | dict(tiny.generate))
        finally:
            os.chdir(before)


def answer(folder: Path, photo: Any) -> None:
    """What FIBO-VLM's network makes of a picture between tokens; its tokenizer is transformers', and not asked."""
    from dataclasses import replace

    from mflux.models.common.networks.qwen_vl import spread_image_tokens
    from mflux.models.fibo.vlm import weights
    from mflux.models.fibo.vlm.generation import Sampling, generate_tokens
    from mflux.models.fibo.vlm.processor import image_processor

    config = weights.read_config(folder)
    weights.end_ids(folder)
    network, image = weights.load(folder), config.image_token_id
    see = replace(image_processor(config), min_pixels=1, max_pixels=max(64 * 64, image_processor(config).token ** 2))
    patches, grids = see.batch([photo])
    before, after = [token for token in range(3) if token != image][:2]
    ids = spread_image_tokens([before, image, after], image, grids, see.merge_size)
    tokens = generate_tokens(network, network.prompt(ids, patches, grids), Sampling(seed=1))
    next(tokens), next(tokens)


def tokenizers(folder: Path) -> None:
    from support.cases import every
    from support.tokenizers import write_clip_tokenizer, write_qwen_tokenizer, write_t5_tokenizer

    for name, write in (("clip", write_clip_tokenizer), ("t5", write_t5_tokenizer), ("qwen", write_qwen_tokenizer)):
        (folder / name).mkdir()
        write(folder / name)
    special = {"pad_token": {"content": "<pad>", "special": True, "lstrip": False}, "eos_token": "</s>"}
    (folder / "t5" / "special_tokens_map.json").write_text(json.dumps(special))
    with tempfile.TemporaryDirectory() as scratch:
        (fibo,) = [tiny for name, tiny in every("TINY").items() if name == "fibo generate-fibo"]
        shutil.copytree(fibo.write(Path(scratch, "x"), wide=False) / "tokenizer", folder / "whole")


def read_tokenizer(folder: Path) -> None:
    from mflux.models.common.tokenizers.prompt_tokenizers import clip_tokenizer, t5_tokenizer, whole_tokenizer
    from mflux.models.common.tokenizers.qwen import qwen_tokenizer

    names = changed_first(folder)
    for name in names:
        kinds = {"clip": clip_tokenizer, "t5": t5_tokenizer, "qwen": qwen_tokenizer, "whole": whole_tokenizer}
        tokenizer = kinds[name](folder / name)
        for prompt in ("a red circle", "", "Ünïcode 红色 🙂 <pad></s><|endoftext|> aaaaaaaaaaaaaaaaaaaaaaaaaaaa!"):
            tokenizer.is_cut(prompt, max_length=8)
            if name == "qwen":
                tokenizer([prompt], max_length=8)
            else:
                tokenizer.encode(prompt, max_length=8)


def pictures(folder: Path) -> None:
    import PIL.features
    import PIL.Image

    image = PIL.Image.effect_noise((13, 7), 90).convert("RGB")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    for name in ("png", "jpg", "webp", "tif", "bmp", "gif", "ppm", *(("avif",) if PIL.features.check("avif") else ())):
        image.save(folder / f"x.{name}", exif=exif)
    image.convert("P").save(folder / "palette.png", transparency=3)
    image.convert("LA").save(folder / "grey.png")
    PIL.Image.new("I;16", (5, 4), 40000).save(folder / "deep.png")
    PIL.Image.new("F", (5, 4), 0.5).save(folder / "float.tif")
    image.save(folder / "frames.gif", save_all=True, append_images=[image.rotate(90)])


def read_picture(folder: Path) -> None:
    import numpy as np

    from mflux.utils.metadata_reader import MetadataReader
    from mflux.utils.picture_files import as_rgb, open_image, oriented_size

    names = changed_first(folder)
    for name in names:
        oriented_size(folder / name)
        np.asarray(as_rgb(open_image(folder / name), on_white=True))
        MetadataReader.read_all_metadata(folder / name)


def settings(folder: Path) -> None:
    import PIL.Image

    from mflux.utils.metadata_builder import MetadataBuilder

    said = {
        "prompt": "a red circle", "negative_prompt": "x", "model": "schnell", "base_model": None, "width": 64,
        "height": 32, "seed": 3, "steps": 2, "guidance": 3.5, "scheduler": "linear", "quantize": 8, "bake_lora": True,
        "lora_paths": ["a.safetensors"], "lora_scales": [0.5], "image_path": None, "image_strength": None,
        "generation_time_seconds": 1.5, "mflux_version": "0.25.0",
    }  # fmt: skip
    (folder / "x.metadata.json").write_text(json.dumps(said))
    for ending, kind in (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")):
        PIL.Image.new("RGB", (8, 8)).save(folder / f"x.{ending}", **MetadataBuilder.save_arguments(said, kind))


def read_picture_settings(folder: Path) -> None:
    """As `-C` and `mflux-info` do; of a picture as it is, and of one with the changed text in it."""
    import PIL.Image

    from mflux.cli.info import lines
    from mflux.cli.replay import take_settings
    from mflux.models.flux.cli.flux_generate import build_parser
    from mflux.utils.metadata_builder import COMMENT_PREFIX
    from mflux.utils.metadata_reader import MetadataReader, read_settings

    name = (folder / "changed").read_text() if (folder / "changed").is_file() else "x.metadata.json"
    if name.endswith(".json"):
        exif = PIL.Image.Exif()
        exif[0x8769] = {0x9286: COMMENT_PREFIX + (folder / name).read_bytes()[:60_000]}
        PIL.Image.new("RGB", (8, 8)).save(folder / "made.png", exif=exif)
    failure = None
    for path in [folder / name, *([folder / "made.png"] if name.endswith(".json") else [])]:
        try:
            MetadataReader.read_all_metadata(path)
            for line in lines(read_settings(path)):
                assert line.isprintable()
            take_settings(*build_parser().parse(["-C", str(path)]))
        except Exception as error:
            failure = failure or error
            if not _is_ours(error):
                raise
    if failure is not None:
        raise failure


def texts(folder: Path) -> None:
    """JSON that no folder of weights holds: plain, a prompt of FIBO's, and what FIBO-VLM answers."""
    prompt = {
        "short_description": "a red circle", "objects": [{"description": "round", "location": "centre"}],
        "style_medium": "drawing", "aesthetics": {"composition": "plain"}, "context": "é\u2028",
    }  # fmt: skip
    (folder / "prompt.json").write_text(json.dumps(prompt))
    (folder / "plain.json").write_text(json.dumps({"a": [1, 2.5, {"b": "text", "c": None}], "d": True, "e": -1e5}))
    (folder / "answer.txt").write_text(f"Here it is:\n```json\n{json.dumps(prompt, indent=1)}\n```\n{{}}")


def read_texts(folder: Path) -> None:
    from mflux.checkpoints.folders import read_json
    from mflux.models.fibo.vlm.json_text import read_object, read_structured_prompt

    read_json(folder / "plain.json")
    read_structured_prompt(folder / "prompt.json")
    read_object((folder / "answer.txt").read_bytes().decode("utf-8", "replace"))


READERS = {
    "weights": Reader(weights, read_weights, ("*",)),
    "gguf": Reader(gguf_file, read_gguf, ("x.gguf",)),
    "stored": Reader(stored_files, read_weights, ("*.safetensors",), mutations.mutated),
    "torch archive": Reader(partial(torch_file, old=False), read_torch, ("x.pt",)),
    "torch stream": Reader(torch_stream, read_torch_stream, ("stream",)),
    "torch legacy": Reader(partial(torch_file, old=True), read_torch, ("x.pt",)),
    "lora": Reader(lora, read_loras, ("*.safetensors", "*/*")),
    "components": Reader(components, read_component, ("*/config.json", "*/*.safetensors")),
    "models": Reader(models, read_model, ("**/*.json", "**/*.txt", "**/*.safetensors")),
    "drawings": Reader(drawings, draw, ("**/*.json", "**/*.txt")),
    "tokenizers": Reader(tokenizers, read_tokenizer, ("*/*",)),
    "pictures": Reader(pictures, read_picture, ("*",)),
    "settings": Reader(settings, read_picture_settings, ("x.*",)),
    "texts": Reader(texts, read_texts, ("*",)),
}


# ---- one process


def work(name: str, seed: int, first: int, seconds: float, folder: Path, finds: Path) -> None:
    """Read one changed file after the other, and tell of each with one letter on stdout."""
    reader, out = READERS[name], os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sound = folder / "sound"
    files = folder / "files"
    if not sound.exists():
        sound.mkdir(parents=True)
        reader.write(sound)
    shutil.rmtree(files, ignore_errors=True)
    shutil.copytree(sound, files)
    for path in (*reader.changed,):
        assert list(sound.glob(path)), f"{name} has no {path}"
    names = sorted({path.relative_to(sound) for glob in reader.changed for path in sound.glob(glob) if path.is_file()})
    # Sound files are read, or nothing that follows means anything; what is loaded late is loaded then.
    reader.read(files)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = set(files.iterdir())
    started, number = time.monotonic(), first
    while time.monotonic() - started < seconds:
        choose = random.Random(f"{seed} {name} {number}")
        path = choose.choice(names)
        content = (sound / path).read_bytes()
        (files / "changed").write_text(path.as_posix())
        (files / path).write_bytes((reader.change or by_ending(path))(content, choose))
        outcome, what = attempt(reader, files)
        if outcome == FIND:
            keep(finds, name, seed, number, files, what)
        out.write(outcome)
        (files / path).write_bytes(content)
        for extra in set(files.iterdir()) - before:
            extra.unlink()
        number += 1


def attempt(reader: Reader, files: Path) -> tuple[bytes, str]:
    """How reading ended, and what happened if it is a find."""
    started = time.process_time()
    try:
        reader.read(files)
        outcome, what = ACCEPTED, ""
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome, what = REFUSED, ""
        message = str(error)
        if not _is_ours(error):
            outcome, what = FIND, traceback.format_exc()
        elif not message.isprintable() or not message or len(message) > LONGEST_MESSAGE:
            outcome, what = FIND, f"not a sentence: {message[:5000]!r}"
    taken = time.process_time() - started
    return (FIND, f"took {taken:.1f} s; {what}") if taken > SLOW_S else (outcome, what)


def keep(finds: Path, name: str, seed: int, number: int, files: Path, what: str) -> Path:
    """The case's files and what happened, in a folder of their own."""
    target = finds / f"{name.replace(' ', '-')}-{seed}-{number}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    changed = (files / "changed").read_text() if (files / "changed").is_file() else ""
    shutil.copytree(files, target / "files")
    about = {"reader": name, "seed": seed, "case": number, "changed": changed, "what": what}
    (target / "find.json").write_text(json.dumps(about, indent=1) + "\n")
    return target


# ---- all of them


def fuzz(name: str, seed: int, seconds: float, finds: Path) -> Counter:
    """Cases of one reader for so long, in as many processes as it takes; counts outcomes."""
    counts: Counter = Counter()
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="mflux-fuzz-") as folder:
        number = 0
        while (left := until - time.monotonic()) > 0:
            call = [sys.executable, __file__, "--finds", str(finds), "--seed", str(seed), "--reader", name]
            call += ["--work", folder, "--first", str(number), "--seconds", str(left)]
            said = Path(folder, "stderr")
            with said.open("wb") as stderr:
                process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=stderr)
            hung, done = False, b""
            while True:
                ready, _, _ = select.select([process.stdout], [], [], HANGS_S)
                if not ready and done:
                    hung = True
                    process.kill()
                came = os.read(process.stdout.fileno(), 1 << 16) if ready or hung else b"?"
                if not came:
                    break
                done += came.strip(b"?")
            status = process.wait()
            process.stdout.close()
            counts.update(bytes([letter]) for letter in done)
            number += len(done)
            if status and not done and not hung and status > 0:
                raise SystemExit(f"{name} does not read its own sound files:\n{said.read_text(errors='replace')}")
            if status:
                last = said.read_text(errors="replace")[-5000:]
                what = f"nothing came for {HANGS_S:.0f} s" if hung else f"the process ended with {status}: {last}"
                keep(finds, name, seed, number, Path(folder, "files"), what)
                counts[FIND] += 1
                number += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--reader", choices=READERS, nargs="+", default=list(READERS))
    parser.add_argument("--finds", type=Path, default=Path("fuzz-finds"))
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.replay is not None:
        reader = READERS[json.loads((args.replay / "find.json").read_text())["reader"]]
        with tempfile.TemporaryDirectory(prefix="mflux-fuzz-") as folder:
            files = Path(shutil.copytree(args.replay / "files", Path(folder, "files")))
            outcome, what = attempt(reader, files)
        print({ACCEPTED: "read", REFUSED: "refused", FIND: "find"}[outcome], what, sep="\n")
        return int(outcome == FIND)
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    finds = args.finds.resolve()
    if args.work is not None:
        work(args.reader[0], seed, args.first, args.seconds, args.work, finds)
        return 0
    print(f"seed {seed}, {args.seconds:.0f} s", flush=True)
    print(f"{'':15}{'cases':>9}{'read':>9}{'refused':>9}{'finds':>7}", flush=True)
    total: Counter = Counter()
    for name in args.reader:
        counts = fuzz(name, seed, args.seconds / len(args.reader), finds)
        total.update(counts)
        report(name, counts)
    report("all", total)
    if total[FIND]:
        print(f"what was found is in {finds}: look at find.json, and --replay one of its folders")
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    return int(total[FIND] > 0)


def report(name: str, counts: Counter) -> None:
    row = (counts.total(), counts[ACCEPTED], counts[REFUSED])
    print(f"{name:15}{''.join(f'{number:9,}' for number in row)}{counts[FIND]:7,}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Environment variables that hold nonsense: each is a sentence, or as if it were not set."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import mflux
from mflux import backend, cpu
from mflux.cli import serve
from mflux.cli.completions import guess_shell, usual_folder
from mflux.cli.ranks import own_part
from mflux.errors import MfluxError
from mflux.hub.secrets import without_secrets
from mflux.models.common.controls.depth_pro.download import fetch_archive
from mflux.models.common.encoded_on_disk import EncodedOnDisk
from mflux.models.common.lora.library import library, library_folders
from mflux.models.common.saved_model import models_folder
from mflux.serve import remote
from mflux.utils.paths import cache_folder

NONSENSE = (
    "",
    " ",
    "abc",
    "9" * 5000,
    "-1",
    "0",
    "1e999",
    "nan",
    "²",
    "/dev/null",
    "~nobody-here/x",
    "x" * 9000,
    "\udcff",
)


def hub(_):
    import huggingface_hub
    import huggingface_hub.constants

    return without_secrets(huggingface_hub, "text")


def download(_):
    return fetch_archive("http://127.0.0.1:9/x", cache_folder() / "x.pt", remedy="wait")


def key_of_a_server(_):
    """Both that know it; what the first refuses, the second has to refuse as well."""
    try:
        serve._rules(serve.build_parser().parse_args([]))
    except MfluxError:
        remote.Server.at("http://127.0.0.1:9")
        return None
    return remote.Server.at("http://127.0.0.1:9")


# Every variable that this package reads itself, and what reads it.
READERS = {
    "OMP_NUM_THREADS": lambda _: cpu.threads(),
    "MFLUX_BLAS": lambda _: getattr(backend, "_blas_is_off", bool)(),
    "MFLUX_DEVICE": lambda _: backend._settle_device(),
    "MFLUX_CACHE_DIR": download,
    "MFLUX_MODELS_DIR": lambda _: models_folder(),
    "MFLUX_PROMPT_CACHE": lambda _: EncodedOnDisk.is_wanted(),
    "XDG_CACHE_HOME": lambda _: cache_folder(),
    "XDG_DATA_HOME": lambda _: usual_folder("bash"),
    "LORA_LIBRARY_PATH": lambda _: library(library_folders()),
    "SHELL": lambda _: guess_shell(),
    "MFLUX_SERVER": lambda _: remote.Server.at(os.environ["MFLUX_SERVER"]),
    "MFLUX_API_KEY": lambda _: (
        remote.Server.at("http://127.0.0.1:9"),
        serve._rules(serve.build_parser().parse_args([])),
    ),
    "MLX_RANK": lambda _: own_part(SimpleNamespace()),
    "HF_TOKEN": hub,
    "HUGGING_FACE_HUB_TOKEN": hub,
}
# Those of huggingface_hub are named in messages; it reads them while it is imported, see `hub.library`.
NAMED = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"}


def test_every_variable_is_tried():
    source = "\n".join(path.read_text(encoding="utf-8") for path in Path(mflux.__file__).parent.rglob("*.py"))
    read = set(re.findall(r"environ(?:\.get\(|\[)\"([A-Z_]+)\"", source))
    assert read - NAMED <= READERS.keys(), "a variable that is read and not tried here"


@pytest.mark.parametrize("name", READERS)
def test_nonsense_in_a_variable(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for value in NONSENSE:
        monkeypatch.setenv(name, value)
        try:
            READERS[name](None)
        except MfluxError as error:
            assert len(str(error)) < 12_000


@pytest.mark.parametrize("name", ["TQDM_MININTERVAL", "TQDM_NCOLS", "TQDM_POSITION", "HF_HUB_ETAG_TIMEOUT"])
def test_nonsense_in_what_libraries_read(name, tmp_path):
    """As they are imported; a process of its own for each."""
    program = (
        "import sys\n"
        "from mflux.errors import MfluxError\n"
        "from mflux.hub import cached_copy\n"
        "try: cached_copy('org/none')\n"
        "except MfluxError as error: print(error)\n"
    )
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), name: "abc"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout or "HF_ environment variables" in done.stdout or not done.stdout

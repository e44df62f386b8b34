"""Names that nothing has or can have, pipes and devices, in every option of every command that takes a path."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from mflux.cli.commands import COMMANDS
from mflux.utils.atomic_files import write_atomically
from mflux.utils.image_util import ImageUtil

# Of these some are sound for some options; none may end in more than a sentence, or in a wait.
NAMES = {
    "empty": "",
    "a space": " ",
    "NUL": "a\0b",
    "half a character": "\ud800",
    "too long": "x" * 300 + ".png",
    "too deep": "a/" * 3000,
    "root": "/",
    "above": "..",
    "nobody's": "~nobody-here/x",
    "a pipe": "pipe.png",
    "a pipe called .json": "pipe.json",
    "a pipe called .safetensors": "pipe.safetensors",
    "a device without end": "/dev/zero",
    "a device": "/dev/null",
    "a folder": "folder.png",
    "not UTF-8": os.fsdecode(b"\xff.png"),
    "missing": "none.png",
    "a circle": "circle.png",
    "control characters": "\x1b[2J.png",
    "a file as a folder": "photo.png/",
}
WORDS = ("path", "image", "model", "lora", "output", "dir", "source", "destination", "control", "mask", "file")
# Seconds that any of them may take.
PATIENCE = 20


@pytest.fixture
def things(in_folder) -> Path:
    """What the names above lead to."""
    for ending in ("png", "json", "safetensors"):
        os.mkfifo(in_folder / f"pipe.{ending}")
    Image.new("RGB", (16, 16), "red").save("photo.png")
    (in_folder / os.fsdecode(b"\xff.png")).write_bytes((in_folder / "photo.png").read_bytes())
    (in_folder / "folder.png").mkdir()
    (in_folder / "circle.png").symlink_to("circle.png")
    return in_folder


@pytest.fixture
def patience() -> Iterator[None]:
    def end(*_: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, end)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def calls(name: str) -> Iterator[tuple[str, str, list[str]]]:
    """Option, kind of name, and a command line that is sound but for that."""
    parser = importlib.import_module(COMMANDS[name].module).build_parser()
    options = [action for action in parser._actions if action.option_strings]
    flags = {flag for action in options for flag in action.option_strings}
    arguments = [action for action in parser._actions if not action.option_strings and action.nargs not in ("?", "*")]
    basic = {"--prompt": "x"} if "--prompt" in flags else {}
    basic |= {action.option_strings[0]: "photo.png" for action in options if action.required}
    if "--model" in flags:
        # One that needs no network to be known; its weights are asked for last, and there is no network.
        basic["--model"] = next((model for model in COMMANDS[name].models if model != "demo"), "schnell")
    for action in parser._actions:
        takes_path = action.type is Path or any(word in action.dest for word in WORDS)
        if not takes_path or action.choices or action.nargs in (0, "A...") or isinstance(action.default, bool):
            continue
        for kind, value in NAMES.items():
            if action.option_strings:
                said = basic | {action.option_strings[0]: value}
                before = ["photo.png"] * len(arguments)
            else:
                said, before = basic, [value if one is action else "photo.png" for one in arguments] or [value]
            yield action.dest, kind, before + [word for pair in said.items() for word in pair]


# What all commands that draw have is the same code and tried once; the model each of them finds itself.
SHARED = {dest for dest, _, _ in calls("generate")} - {"model"}


@pytest.mark.parametrize(
    "name", sorted(COMMANDS.keys() - {"doctor", "completions", "capabilities", "lora-library", "check"})
)
def test_every_option_of_every_command(name, cli, things, patience):
    tried, wrong = 0, []
    draws = name.startswith("generate-")
    for option, kind, words in calls(name):
        if draws and option in SHARED:
            continue
        signal.alarm(PATIENCE)
        try:
            result = cli(name, *words)
        except Exception as error:
            wrong.append((option, kind, f"{type(error).__name__}: {error}"))
            continue
        tried += 1
        said = (result.out + result.err).replace("\t", " ").split("\n")
        if len(result.errors) != (result.status != 0) or not all(line.isprintable() for line in said):
            wrong.append((option, kind, said))
        if max(map(len, said)) > 2100:
            wrong.append((option, kind, "without end"))
    assert wrong == []
    assert tried >= len(NAMES)


@pytest.mark.parametrize("kind", sorted(NAMES.keys() - {"root", "above"}))
def test_folders_of_loras(kind, cli, things):
    for words in ((NAMES[kind],), (".", NAMES[kind])):
        result = cli("lora-library", "list", "--paths", *words)
        assert len(result.errors) == (result.status != 0)
        assert all(line.isprintable() for line in (result.out + result.err).split("\n"))


@pytest.mark.parametrize("kind", NAMES)
def test_models_to_check(kind, cli, things, patience):
    signal.alarm(PATIENCE)
    result = cli("check", "model", NAMES[kind])
    # What lies in the folder of all folders is another machine's business.
    assert result.status in (1, 2) or kind == "root"
    assert len(result.errors) == ("check: " not in result.out)
    assert all(line.isprintable() for line in (result.out + result.err).split("\n"))


@pytest.mark.parametrize("way", ["<(printf 'a red circle')", "pipe.png", "/dev/zero"])
def test_a_prompt_file_that_is_no_file(things, way):
    """What a shell gives in place of a file is read; nobody waits for a pipe without a writer."""
    command = f"{sys.executable} -m mflux.cli.main generate --model demo --steps 1 --output a.png --prompt-file {way}"
    paths = map(os.path.abspath, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=60)
    if way.startswith("<"):
        assert (done.returncode, done.stdout) == (0, "a.png\n"), done.stderr
    else:
        (line,) = done.stderr.splitlines()
        assert (done.returncode, line.startswith("error: ")) == (2, True)


# ---- a finished picture is kept


@pytest.mark.parametrize("ending", [".png", ".metadata.json.png"])
def test_a_taken_name_of_255_bytes_does_not_cost_the_picture(in_folder, ending):
    name = in_folder / ("é" * ((255 - len(ending)) // 2) + ending)
    picture = Image.new("RGB", (8, 8), "red")
    written = [ImageUtil.save_image(picture, name, {"seed": 1}, export_json_metadata=True) for _ in range(3)]
    assert len(set(written)) == 3
    for path in written:
        assert len(os.fsencode(path.name)) <= 255
        with Image.open(path) as image:
            image.load()
        assert path.with_suffix(".metadata.json").is_file()


WRITER = """
import os, sys
from pathlib import Path
from mflux.utils.atomic_files import write_atomically
def no_links(*args, **kwargs):
    raise OSError(95, "Operation not supported")
os.link = no_links
for number in range(40):
    content = f"{sys.argv[1]} {number}".encode()
    print(write_atomically(Path("x.png"), lambda file: file.write(content), overwrite=False), number)
"""


def test_a_file_system_without_links_loses_no_picture(in_folder):
    paths = map(os.path.abspath, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, who], stdout=subprocess.PIPE, text=True, env=environment)
        for who in ("a", "b", "c")
    ]
    told = {}
    for who, process in zip("abc", processes, strict=True):
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        told |= {path: f"{who} {number}" for path, number in map(str.split, out.splitlines())}
    # Each under a name of its own, with what its writer put in.
    assert len(told) == 120
    assert {path.name: path.read_text() for path in in_folder.iterdir()} == told


def test_links_that_are_refused_once(in_folder, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no")))
    for number in range(3):
        write_atomically(in_folder / "x.png", lambda file, n=number: file.write(b"%d" % n), overwrite=False)
    assert sorted(path.name for path in in_folder.iterdir()) == ["x.png", "x_1.png", "x_2.png"]

"""A command as a process: signals that end it, and standard streams that are closed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
from PIL import Image

import mflux
from mflux.cli.process import signals_raise
from mflux.cli.terminal import run

COMMAND = [sys.executable, "-m", "mflux.cli.main"]
DRAW = ["generate", "--model", "demo", "--prompt", "a red circle", "--steps", "1", "--seed", "1", "--output", "a.png"]
ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}

# A part of a command that is under way when the signal comes.
WRITING = """
import os, signal, sys, time
from pathlib import Path
from mflux.cli.terminal import run
from mflux.utils.atomic_files import write_atomically
# A background job ignores the first, and what was started with nohup the second.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

def write(file):
    file.write(b"half")
    print("ready", flush=True)
    time.sleep(60)

sys.exit(run(lambda argv: write_atomically(Path("x.bin"), write, overwrite=False), []))
"""

SCHEDULER = """
import os, signal
from mflux.models.common.schedulers import LinearScheduler

class Ended(LinearScheduler):
    def step(self, noise, timestep, latents, **kwargs):
        if timestep == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(noise, timestep, latents, **kwargs)
"""


@pytest.fixture
def environment() -> dict[str, str]:
    """For a process in another folder."""
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths))}


# ---- signals


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
def test_a_signal_while_writing(tmp_path, environment, number):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=environment,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (ENDS[number], "error: stopped\n")
    assert list(tmp_path.iterdir()) == []


def test_a_signal_in_the_middle_of_a_picture(cli_process, tiny_schnell, tmp_path, environment):
    (tmp_path / "of_mine.py").write_text(SCHEDULER)
    work = tmp_path / "work"
    work.mkdir()
    result = cli_process(
        *("generate", "--model", tiny_schnell, "--prompt", "a red circle", "--width", 48, "--height", 32),
        *("--steps", 4, "--seed", 7, "--scheduler", "of_mine.Ended", "--stepwise-image-output-dir", "steps"),
        cwd=work,
        env=environment | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}"},
    )
    assert (result.status, result.errors, result.out) == (143, ["error: stopped at step 2 of 4"], "")
    # The picture so far survives, as after Ctrl-C.
    names = sorted(path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file())
    assert names == [f"steps/seed_7_{step}.png" for step in ("composite", "step0of4", "step1of4")]


def test_what_somebody_has_set_stays():
    """nohup's ignoring, a program's own handler, and nothing at all outside the main thread."""
    set_before = {signal.SIGTERM: signal.SIG_IGN, signal.SIGHUP: lambda *_: None}
    kept = {number: signal.signal(number, handler) for number, handler in set_before.items()}
    try:
        with signals_raise():
            assert {number: signal.getsignal(number) for number in set_before} == set_before
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    before = signal.getsignal(signal.SIGTERM)
    with signals_raise():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    found = []
    thread = threading.Thread(target=lambda: found.append(run(lambda argv: 7, [])))
    thread.start()
    thread.join()
    assert found == [7]


IMPORTING = """
import builtins, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.orig_argv[:] = [sys.executable, "/somewhere/bin/" + sys.argv[1], *sys.argv[1:]]
import mflux
real = builtins.__import__
def stop(name, *args, **kwargs):
    if name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *args, **kwargs)
builtins.__import__ = stop
from mflux.cli.main import main
sys.exit(main(["--version"]))
"""


@pytest.mark.parametrize("at", ["difflib", "mflux.cli.commands", "mflux.models.common.family", "dataclasses"])
def test_ctrl_c_while_a_command_is_imported(environment, at):
    call = [sys.executable, "-c", IMPORTING, "mflux-generate", at]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: stopped\n")


REMOVING = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.orig_argv[:] = [sys.executable, "-OO", "-m", "mflux"]
sys.argv[:] = ["-m"]
import mflux
class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)
Last()
time.sleep(20)
"""


def test_ctrl_c_while_an_object_is_removed(environment):
    """Python says "Exception ignored in" then, and goes on."""
    done = subprocess.run([sys.executable, "-c", REMOVING], capture_output=True, text=True, env=environment, timeout=15)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: stopped\n")


@pytest.mark.parametrize("options", [[], ["-OO"], ["-I"], ["-OO", "-I", "-X", "utf8"]], ids=" ".join)
def test_python_m(options, tmp_path, environment):
    """For who has the package and not its commands on the PATH; from any folder."""
    where = [sys.executable, *options, "-c", "import mflux; print(mflux.__path__[0])"]
    if subprocess.run(where, capture_output=True, text=True, env=environment).stdout.strip() != mflux.__path__[0]:
        pytest.skip("-I sees installed packages only, and another checkout is installed")
    words = ["generate", "--model", "demo", "--prompt", "x", "--steps", "1", "--seed", "1"]
    runs = [(["--version"], 0, "mflux "), (["--help"], 0, "usage: mflux COMMAND"), (["nonsense"], 2, "")]
    for arguments, status, said in [*runs, (words, 0, "image.png")]:
        call = [sys.executable, *options, "-m", "mflux", *arguments]
        done = subprocess.run(call, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == status and done.stdout.startswith(said), done.stderr
        assert "Traceback" not in done.stderr


def test_a_program_of_somebody_keeps_its_traceback(environment):
    call = [sys.executable, "-c", IMPORTING, "draw.py", "difflib"]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=30)
    assert done.stderr.startswith("Traceback")
    code = IMPORTING.replace("from mflux.cli.main import main", "1 / 0")
    done = subprocess.run([sys.executable, "-c", code, "mflux-x", "-"], capture_output=True, text=True, env=environment)
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


# ---- standard streams


def closed(*numbers: int, words: list[str], cwd, env) -> subprocess.CompletedProcess:
    """A command that is started with these file numbers closed."""
    ends = " ".join(f"{number}>&-" if number else "0<&-" for number in numbers)
    shell = ["sh", "-c", f'exec "$@" {ends}', "sh", *COMMAND, *words]
    return subprocess.run(shell, capture_output=True, text=True, cwd=cwd, env=env, timeout=60)


@pytest.mark.parametrize("numbers", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_closed_streams_cost_no_picture(tmp_path, environment, tiny_schnell, numbers):
    words = [str(tiny_schnell) if word == "demo" else word for word in DRAW]
    done = closed(*numbers, words=words, cwd=tmp_path, env=environment)
    with Image.open(tmp_path / "a.png") as picture:
        picture.load()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    if 1 in numbers:
        told = "error: cannot write to standard output (it is closed): the work is done, its results were not told\n"
        assert (done.returncode, done.stdout) == (1, "")
        assert 2 in numbers or done.stderr.endswith(told)
    else:
        assert (done.returncode, done.stdout) == (0, "a.png\n")
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr or 1 in numbers


def test_a_prompt_from_a_closed_stream(tmp_path, environment):
    words = [word.replace("a red circle", "-") for word in DRAW]
    done = closed(0, words=words, cwd=tmp_path, env=environment)
    told = 'error: there is no prompt: standard input is closed: say it with --prompt "…", or pipe it in'
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (2, "", told)


@pytest.mark.parametrize("how", ["0>there", "0</dev/null"])
def test_a_prompt_from_what_cannot_be_read(tmp_path, environment, how):
    words = [word.replace("a red circle", "-") for word in DRAW]
    shell = ["sh", "-c", f'exec "$@" {how}', "sh", *COMMAND, *words]
    done = subprocess.run(shell, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith(("error: cannot read standard input: ", "error: there is no prompt: "))


@pytest.mark.parametrize("words", [["info", "missing.png"], ["generate"], ["--help"], ["info", "--help"], ["doctor"]])
def test_no_command_needs_its_streams(tmp_path, environment, words):
    for numbers in ((0,), (2,), (0, 1, 2)):
        done = closed(*numbers, words=words, cwd=tmp_path, env=environment)
        assert done.returncode in (0, 1, 2)
        assert "Traceback" not in done.stdout + done.stderr
        assert "error:" not in done.stdout

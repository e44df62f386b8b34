"""Several processes of one program, as `mlx.launch` starts them on this machine."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path


def launched(count: int, *words: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """How they ended; another test's may run at the same time, so the ports are no others' as far as can be told."""
    beside = Path(sys.executable).with_name("mlx.launch")
    launch = str(beside) if beside.is_file() else shutil.which("mlx.launch")
    assert launch is not None, "mlx comes with mlx.launch"
    call = [launch, "-n", count, "--backend", "ring", "--starting-port", _free_ports(count), "--", *words]
    done = subprocess.run(list(map(str, call)), capture_output=True, text=True, env=os.environ, timeout=180, cwd=folder)
    # It ends well whatever becomes of the processes.
    assert "exited with code" not in done.stderr and "was killed" not in done.stderr, done.stderr
    return done


def _free_ports(count: int) -> int:
    """The first of so many that are free, one after the other, below those that the system gives out."""
    for _ in range(100):
        start = 20_000 + secrets.randbelow(12_000)
        free = True
        for port in range(start, start + count):
            with closing(socket.socket()) as probe:
                free = free and probe.connect_ex(("127.0.0.1", port)) != 0
        if free:
            return start
    raise AssertionError("no ports are free")

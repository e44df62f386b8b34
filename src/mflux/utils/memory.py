"""What memory this machine lets a process have."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# A container's limit, in the second and the first version of control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        total: of the machine.
        available: free to use now; None where that cannot be told.
        limit: what a container may have, if that is less than all.
        swap: on disk, beside `total`.
    """

    total: int
    available: int | None = None
    limit: int | None = None
    swap: int = 0

    @property
    def most(self) -> int:
        """More than any process can have here."""
        return min(self.total, self.limit or self.total) + self.swap


def machine_memory() -> Memory:
    """This machine's, as far as it tells."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    told = {}
    for line in lines_of("/proc/meminfo"):
        name, _, rest = line.partition(":")
        if rest.split()[1:] == ["kB"]:
            told[name] = int(rest.split()[0]) * 1024
    limits = [int(line) for path in _LIMITS for line in lines_of(path) if line.isdigit() and int(line) < total]
    return Memory(total, told.get("MemAvailable"), min(limits, default=None), told.get("SwapTotal", 0))


def lines_of(path: str) -> list[str]:
    """The lines of a file that the system makes; none where there is no such file."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []

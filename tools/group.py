"""Print the requirements of a dependency group of pyproject.toml, one a line, for pip versions that know no groups."""

import sys
import tomllib
from pathlib import Path

groups = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["dependency-groups"]


def requirements(name: str) -> list[str]:
    found = []
    for entry in groups[name]:
        found += requirements(entry["include-group"]) if isinstance(entry, dict) else [entry]
    return found


print("\n".join(requirements(sys.argv[1])))

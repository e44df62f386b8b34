"""Print what uv.lock has for this Python on this system as constraints, one a line, for pip and uv.

The Makefile gives them to every install, so that an environment made today is the one that passed once. torch is left
out: which of its builds the lock has depends on the index, and the Makefile pins its version itself. Runs under a bare
python3.
"""

from __future__ import annotations

import ast
import operator
import os
import platform
import sys
import tomllib
from pathlib import Path

LOCK = Path(__file__).resolve().parents[1] / "uv.lock"
LEFT_OUT = {"torch"}

_COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def here() -> dict[str, str]:
    """The variables of a marker that can split a lock of ours, for the interpreter that runs this."""
    return {
        "python_full_version": ".".join(map(str, sys.version_info[:3])),
        "python_version": ".".join(map(str, sys.version_info[:2])),
        "implementation_name": sys.implementation.name,
        "os_name": os.name,
        "platform_machine": platform.machine(),
        "platform_python_implementation": platform.python_implementation(),
        "platform_system": platform.system(),
        "sys_platform": sys.platform,
    }


def holds(marker: str, environment: dict[str, str]) -> bool:
    """Whether a marker is true there; every marker reads as a Python expression.

    Raises:
        ValueError: it has more in it than comparisons of those variables with strings, `and` and `or`.
    """

    def value(node: ast.expr) -> bool:
        match node:
            case ast.BoolOp(op=ast.And(), values=parts):
                return all(value(part) for part in parts)
            case ast.BoolOp(op=ast.Or(), values=parts):
                return any(value(part) for part in parts)
            case ast.Compare(left=ast.Name(id=name), ops=[sign], comparators=[ast.Constant(value=str(text))]) if (
                name in environment and type(sign) in _COMPARE
            ):
                if name.startswith("python_"):
                    return _COMPARE[type(sign)](_version(environment[name]), _version(text))
                if isinstance(sign, ast.Eq | ast.NotEq):
                    return _COMPARE[type(sign)](environment[name], text)
        raise ValueError(f"tools/constraints.py cannot read the marker {marker!r} of uv.lock")

    return value(ast.parse(marker, mode="eval").body)


def _version(text: str) -> tuple[int, ...]:
    """3.12 and 3.12.0 are one version."""
    parts = [int(part) for part in text.split(".")]
    return tuple(parts + [0] * (3 - len(parts)))


def locked(environment: dict[str, str] | None = None, lock: Path = LOCK) -> dict[str, str]:
    """The version of each distribution of the lock, for one environment (default: this one).

    Raises:
        ValueError: the lock is not for this environment, or has two versions of one distribution for it.
    """
    environment = environment or here()
    content = tomllib.loads(lock.read_text())
    for field in ("supported-markers", "resolution-markers"):
        if not _applies(content, field, environment):
            raise ValueError(f"uv.lock is not for {environment['sys_platform']}")
    versions: dict[str, str] = {}
    for package in content["package"]:
        # A file that `uv sync` has completed has the project itself, too.
        if "registry" in package["source"] and _applies(package, "resolution-markers", environment):
            if package["name"] in versions:
                raise ValueError(f"uv.lock has two versions of {package['name']} for this Python")
            versions[package["name"]] = package["version"]
    return versions


def _applies(table: dict, field: str, environment: dict[str, str]) -> bool:
    return field not in table or any(holds(marker, environment) for marker in table[field])


def main() -> int:
    try:
        versions = locked()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, version in versions.items():
        if name not in LEFT_OUT:
            print(f"{name}=={version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

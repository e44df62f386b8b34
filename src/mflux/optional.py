"""Which optional extra brings which package, and the sentence that says so when one is missing.

`require` is called where a package is used, inside the function, so that a plain `pip install mflux` never meets it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType

from mflux.errors import MissingExtraError

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Extra:
    """An optional dependency group: the modules it brings, and what for."""

    packages: tuple[str, ...]
    purpose: str

    @property
    def brings_torch(self) -> bool:
        return "torch" in self.packages


EXTRAS: dict[str, Extra] = {
    "torch-lite": Extra(("torch",), "PyTorch files with sparse, quantized or nested tensors"),
    "vlm": Extra(
        ("transformers", "jinja2"), "FIBO-VLM: mflux-inspire-fibo, mflux-refine-fibo, words for mflux-generate-fibo"
    ),
    "gguf": Extra(("gguf",), "GGUF files with weights of the IQ1, IQ2, IQ3 and TQ1 types"),
    "serve": Extra(
        ("starlette", "uvicorn", "python_multipart", "prometheus_client"),
        "mflux serve: models kept loaded, over HTTP, with a page",
    ),
}
EXTRAS["full"] = Extra(
    tuple(dict.fromkeys(package for extra in EXTRAS.values() for package in extra.packages)), "all of the above"
)


def is_installed(extra: str) -> bool:
    """Whether every package of an extra that is for this system can be found, without importing any."""
    return all(_is_present(package) for package in EXTRAS[extra].packages)


def require(package: str, *, extra: str, feature: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Args:
        package: the module to import, such as "transformers".
        extra: the extra that brings it, a key of `EXTRAS`.
        feature: what needs it, as a person would call it: "FIBO-VLM".

    Raises:
        MissingExtraError: the package is not installed. A package that is installed but broken raises its own error.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package.partition(".")[0]:
            raise
        raise MissingExtraError(missing_message(package, extra=extra, feature=feature), name=package) from None


def missing_message(package: str, *, extra: str, feature: str) -> str:
    """The sentence for a missing package, with the commands that mend it."""
    return (
        f"{feature} needs the package {package.partition('.')[0]}, which is not installed: "
        f"{pip_command(extra)} (with uv: uv sync --extra {extra})"
    )


def pip_command(extra: str) -> str:
    """The pip command that adds an extra. On Linux plain pip would fetch torch with CUDA, so the CPU index is named."""
    command = f'pip install "mflux[{extra}]"'
    if EXTRAS[extra].brings_torch and sys.platform == "linux":
        command += f" --extra-index-url {TORCH_CPU_INDEX}"
    return command


def _is_present(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False

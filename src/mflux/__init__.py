"""Generative image models on Apple's MLX, without torch.

`mflux.load("z-image-turbo", quantize=4)` opens a model. Importing this package imports nothing heavy; the classes live
at the paths that mflux 0.24 gave them, for example `mflux.models.flux.variants.txt2img.flux.Flux1`. Other distributions
add to it: `mflux.web`, `mflux.extras`.
"""

import os
import sys

if any(
    os.path.basename(word).startswith("mflux")  # noqa: PTH119
    for word in sys.orig_argv[1 : len(sys.orig_argv) - len(getattr(sys, "argv", ())) + 1]
):
    # What Python was started with, before the words for the program, is a command: as itself, or behind -m. Ctrl-C may
    # come while its imports run, before anything can catch it.
    def _excepthook(kind, error, trace, *, show=sys.excepthook):
        # What is raised while a class is made has it for its cause.
        if not issubclass(kind, KeyboardInterrupt) and not isinstance(error.__cause__, KeyboardInterrupt):
            show(kind, error, trace)
            return
        if sys.stderr is not None:
            print("error: stopped", file=sys.stderr)
        # Python takes it for the program's own end, with the status that it has everywhere else.
        raise SystemExit(130)

    def _unraisablehook(unraisable, *, show=sys.unraisablehook):
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            show(unraisable)
            return
        # It came while an object was removed, where nothing can be raised: once more, when that is over.
        import _signal
        import _thread
        import time

        _thread.start_new_thread(lambda: (time.sleep(0.02), os.kill(os.getpid(), _signal.SIGINT)), ())

    sys.excepthook, sys.unraisablehook = _excepthook, _unraisablehook

from pathlib import Path
from pkgutil import extend_path
from typing import Any

from mflux import import_paths

__all__ = ["__version__", "load"]

# Folders called mflux elsewhere on the path belong to it, as in mflux 0.24; another copy of mflux itself does not.
__path__ = __path__[:1] + [path for path in extend_path(__path__, __name__)[1:] if not Path(path, "models").is_dir()]

import_paths.install()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from mflux.utils.version_util import VersionUtil

        return VersionUtil.get_mflux_version()
    if name == "load":
        from mflux.models.common.load import load

        return load
    raise AttributeError(f"module 'mflux' has no attribute {name!r}")

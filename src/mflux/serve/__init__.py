"""A model kept loaded, for whoever asks: `Engine` for Python programs, and over HTTP `mflux serve`.

Importing this loads nothing heavy, and the HTTP half (`app`, `sdapi`) needs the extra `serve`.
"""

from mflux.serve.engine import Engine

__all__ = ["Engine"]

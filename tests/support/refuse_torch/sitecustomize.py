"""Makes torch and transformers look absent, in every Python process that has this folder on its PYTHONPATH.

`conftest.py` puts it there when MFLUX_REFUSE_TORCH is 1, for the tests' own process and for those they start.
"""

import sys

REFUSED = ("torch", "transformers")


class Refusal:
    """An import hook that stands before all others."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"the tests refuse to import {name}", name=name)


sys.meta_path.insert(0, Refusal)

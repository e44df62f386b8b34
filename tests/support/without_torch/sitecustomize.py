"""Makes torch and torchvision look absent in every Python process that has this folder on its PYTHONPATH.

Looking for them finds nothing, as transformers does to see what it can use; importing them fails.
"""

import importlib.util
import sys

REFUSED = ("torch", "torchvision")
_find_spec = importlib.util.find_spec


class Refusal:
    """An import hook that stands before all others."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"the tests refuse to import {name}", name=name)


def find_spec(name, package=None):
    return None if name.partition(".")[0] in REFUSED else _find_spec(name, package)


sys.meta_path.insert(0, Refusal)
importlib.util.find_spec = find_spec

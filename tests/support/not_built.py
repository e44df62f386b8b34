"""A model that mflux 0.24 has and this version does not yet, for the tests of what is said of such a one."""

from __future__ import annotations

from collections import Counter

from mflux.models.common.family import built
from mflux.models.common.registry import MODELS

_REPOSITORIES = Counter(model["model_name"] for model in MODELS.values())
# Whose repository is no other one's. Where every model is built, so is what these tests are about, and they can go.
KEY = next(key for key, model in MODELS.items() if key not in built() and _REPOSITORIES[model["model_name"]] == 1)
REPOSITORY, FAMILY = MODELS[KEY]["model_name"], MODELS[KEY]["family"]
TOLD = f"{KEY} is not built yet in this version (the family {FAMILY})"

"""Fixtures of the tests that compare with the reference implementations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def published() -> dict:
    """Configurations and parameter counts of published models, by model and component."""
    path = Path(__file__).parent.parent / "data" / "published_configs.json"
    return json.loads(path.read_text())

"""What a class declares of its components, for checkers, editors and readers, is what its family's table says."""

from __future__ import annotations

from typing import get_args, get_origin, get_type_hints

import pytest

from mflux.models.common.family import families, load_object
from mflux.models.common.memory import LazyComponent

CLASSES = {reference: load_object(reference) for family in families().values() for reference in family.pipelines}


@pytest.mark.parametrize("reference", CLASSES)
def test_a_class_declares_its_components_with_their_types(reference):
    cls = CLASSES[reference]
    declared = {name: hint for name, hint in get_type_hints(cls).items() if get_origin(hint) is LazyComponent}
    assert declared.keys() == {component.name for component in cls.components}
    for component in cls.components:
        (kind,) = get_args(declared[component.name])
        assert kind is component.module_class(), component.name
        assert isinstance(getattr(cls, component.name), LazyComponent)


def test_there_is_something_to_test():
    assert len(CLASSES) > 10

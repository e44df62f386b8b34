"""Noise schedules: which sigmas a picture passes on its way from noise, and how one step is taken.

A schedule is built from a `Config` and looked up by name; `package.module.Class` names one of your own, derived from
`BaseScheduler`.
"""

from __future__ import annotations

import importlib

from mflux.errors import UsageError
from mflux.models.common.schedulers.base_scheduler import BaseScheduler
from mflux.models.common.schedulers.er_sde_scheduler import ErSdeScheduler
from mflux.models.common.schedulers.flow_match_euler_discrete_scheduler import FlowMatchEulerDiscreteScheduler
from mflux.models.common.schedulers.linear_scheduler import (
    LightningScheduler,
    LinearScheduler,
    SeedVR2EulerScheduler,
)

__all__ = [
    "BaseScheduler",
    "ErSdeScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LightningScheduler",
    "LinearScheduler",
    "SeedVR2EulerScheduler",
    "scheduler_class",
]


class SchedulerModuleNotFound(UsageError, ValueError):
    """The module of a schedule of one's own cannot be imported."""


class SchedulerClassNotFound(UsageError, ValueError):
    """The module has no such class."""


class InvalidSchedulerType(UsageError, TypeError):
    """What has the name is no schedule."""


SCHEDULER_REGISTRY: dict[str, type[BaseScheduler]] = {
    "linear": LinearScheduler,
    "LinearScheduler": LinearScheduler,
    "lightning": LightningScheduler,
    "LightningScheduler": LightningScheduler,
    "flow_match_euler_discrete": FlowMatchEulerDiscreteScheduler,
    "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler,
    "er_sde": ErSdeScheduler,
    "euler": LinearScheduler,
    "seedvr2_euler": SeedVR2EulerScheduler,
    "SeedVR2EulerScheduler": SeedVR2EulerScheduler,
}


def register_contrib(scheduler_object: type[BaseScheduler], scheduler_name: str | None = None) -> None:
    """Make a schedule of your own known by name, its class name unless told otherwise."""
    SCHEDULER_REGISTRY[scheduler_name or scheduler_object.__name__] = scheduler_object


def scheduler_class(name: str) -> type[BaseScheduler]:
    """The schedule of that name.

    Raises:
        UsageError: there is none, it cannot be imported, or it is not a `BaseScheduler`; the error's class says which.
    """
    return SCHEDULER_REGISTRY[name] if name in SCHEDULER_REGISTRY else try_import_external_scheduler(name)


def try_import_external_scheduler(scheduler_object_path: str) -> type[BaseScheduler]:
    """A schedule of one's own, as "package.module.Class"; errors are those of `scheduler_class`."""
    name = scheduler_object_path
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise SchedulerModuleNotFound(
            f"the scheduler {name!r} is not known: use linear, flow_match_euler_discrete, "
            "lightning, or your own as package.module.Class"
        )
    wrong: type[UsageError] = SchedulerModuleNotFound
    try:
        module = importlib.import_module(module_name)
        wrong = SchedulerClassNotFound
        found = getattr(module, attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise wrong(f"the scheduler {name!r} cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, BaseScheduler)):
        raise InvalidSchedulerType(f"{name!r} is not a class derived from mflux.models.common.schedulers.BaseScheduler")
    return found

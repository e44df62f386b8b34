"""Stops before a picture when a MacBook's battery runs low."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

from mflux.utils.exceptions import StopImageGenerationException


class BatterySaver:
    """Before each picture: on a Mac that runs on battery at `battery_percentage_stop_limit` percent or less, stop."""

    def __init__(self, battery_percentage_stop_limit: int = 10):
        self.limit = battery_percentage_stop_limit

    def call_before_loop(self, **kwargs: Any) -> None:
        """
        Raises:
            StopImageGenerationException: the battery is at the limit or below.
        """
        percentage = battery_percentage()
        if percentage is not None and percentage <= self.limit:
            raise StopImageGenerationException(
                f"stopped: the battery is at {percentage} %, the limit is {self.limit} % "
                "(--battery-percentage-stop-limit); plug in and run again"
            )


def battery_percentage() -> int | None:
    """How full the battery is, None while plugged in and on machines without one."""
    if sys.platform != "darwin":
        return None
    try:
        report = subprocess.run(["pmset", "-g", "batt"], capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_pmset(report)


def parse_pmset(report: str) -> int | None:
    """The battery's percentage in the output of `pmset -g batt`, None on mains or without a battery."""
    found = re.search(r"InternalBattery\S*.*?(\d+)%", report)
    return None if "'AC Power'" in report or found is None else int(found.group(1))

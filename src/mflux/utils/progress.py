"""The bar that shows progress, loaded when there is something to show."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mflux.errors import UsageError
from mflux.text import shown, some

if TYPE_CHECKING:
    from tqdm import tqdm


def bar_class() -> type[tqdm]:
    """
    Raises:
        UsageError: tqdm reads its settings while it is imported, and one of them makes no sense.
    """
    try:
        from tqdm import tqdm
    except ValueError as error:
        named = some(sorted(name for name in os.environ if name.startswith("TQDM_")), 5)
        reason = f"an environment variable makes no sense ({shown(error, 100)})"
        raise UsageError(f"{reason}: correct or unset {named}") from None
    return tqdm

"""Tables that depend on sizes alone: kept with the network that uses them, and gone with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Table = TypeVar("Table")

# Of one size of frames at a flow scale: masks and positions of two stages, with and without shift, at both sizes, and
# the grids of five levels and of the small size.
_KEPT = 22


class Tables:
    """Calls a function of sizes once, as long as its result is among those used last. A copy starts with none."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Any] = {}  # the one used last is last

    def __call__(self, make: Callable[..., Table], *key: Any) -> Table:
        """make(*key)."""
        entry = (make, *key)
        self._kept[entry] = table = self._kept.pop(entry) if entry in self._kept else make(*key)
        if len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]
        return table

    def clear(self) -> None:
        """Forgets all of them."""
        self._kept.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tables:
        return Tables()

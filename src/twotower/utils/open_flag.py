"""Read the column `is_open` of items: 0 for an item that is no longer available, such as a permanently closed business."""

from __future__ import annotations

from typing import Any

IS_OPEN = "is_open"
FLAGS = {  # by text in lower case
    **dict.fromkeys(("1", "1.0", "true", "t", "yes", "y", "open"), 1),
    **dict.fromkeys(("0", "0.0", "false", "f", "no", "n", "closed"), 0),
}


def open_flag(value: Any) -> int | None:
    """Return 1 for an available item, 0 for one that is not, None if it is unknown.

    Examples
    --------
    >>> open_flag("FALSE"), open_flag("no"), open_flag(0.0), open_flag(True), open_flag(None)
    (0, 0, 0, 1, None)
    """
    return FLAGS.get(str(value).strip().lower())

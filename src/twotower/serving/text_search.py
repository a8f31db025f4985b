"""Find texts by a part of them, ignoring case and accents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def folded(column: pa.ChunkedArray) -> pa.Array:
    """Return the texts in lower case and without accents; null becomes empty."""
    plain = pc.replace_substring_regex(pc.utf8_normalize(column.cast(pa.string()), form="NFKD"), r"\p{Mn}", "")
    return pc.fill_null(pc.utf8_lower(plain), "").combine_chunks()


def holding(texts: pa.Array, query: str) -> Any:
    """Return the positions (int64) of the folded texts that contain `query`."""
    return np.flatnonzero(pc.match_substring(texts, fold(query)).to_numpy(zero_copy_only=False))


def fold(text: str) -> str:
    """Return one text in lower case and without accents.

    Examples
    --------
    >>> fold("Café")
    'cafe'
    """
    return str(folded(pa.chunked_array([[text]]))[0])

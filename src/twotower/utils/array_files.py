"""Write named arrays to a safetensors file and open them as memory maps.

Opening neither copies nor casts: it is fast for any size, only the pages that are accessed are read, and all processes of a host
share them. The same arrays always give the same bytes. Every array begins at a multiple of its item size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twotower.errors import DataError, clause
from twotower.utils.types import Array

TYPES = {"BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
NAMES = {np.dtype(kind): name for name, kind in TYPES.items()}
LENGTH_BYTES = 8  # of the little-endian integer that holds the header's length


def arrays_of(record: Any) -> dict[str, Array]:
    """Return the arrays of a dataclass by name, without those that are None.

    They are not copied. `dataclasses.asdict` copies every array, which at ten million items takes gigabytes.
    """
    named = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: array for name, array in named.items() if array is not None}


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write `arrays`, of the types in `TYPES`, to `path` one after another, without a second copy in memory."""
    header, end = {}, 0
    ordered = sorted(
        arrays.items(), key=lambda pair: (-pair[1].dtype.itemsize, pair[0])
    )  # widest types first, so that all are aligned
    for name, array in ordered:
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype], "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for _, array in ordered:
            np.ascontiguousarray(array).tofile(file)


def open_arrays(path: Path, *, writable: bool = False) -> dict[str, Array]:
    """Return the arrays of a safetensors file as memory maps.

    Parameters
    ----------
    writable
        True: changes of the arrays are kept in memory and never written to the file (copy-on-write). False: they are read-only.

    Raises
    ------
    DataError
        The file is missing, truncated, or not a safetensors file.
    """
    try:
        content = np.memmap(path, np.uint8, mode="c" if writable else "r").view(np.ndarray)
        return dict(_views(content))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a complete safetensors file: {clause(error)}. Create it again.") from None


def _views(content: NDArray[np.uint8]) -> Iterator[tuple[str, Array]]:
    start = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES].tobytes(), "little")
    header = json.loads(content[LENGTH_BYTES:start].tobytes())
    last = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if len(content) != start + last:
        raise ValueError(f"{len(content):,} bytes, but the header says {start + last:,}")
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield name, content[start + begin : start + end].view(TYPES[entry["dtype"]]).reshape(entry["shape"])

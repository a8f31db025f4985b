"""Take tables and lists of other libraries as Arrow, and give answers back in the caller's library.

A frame is a pandas or polars DataFrame, a polars LazyFrame, an Arrow table, a DuckDB relation, any other object with the Arrow
stream protocol, or a dict of columns. pandas and polars are not imported unless the caller did.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import pyarrow as pa

from twotower.errors import DataError, RequestError, nearest
from twotower.utils.columns import simple_columns
from twotower.utils.console import log
from twotower.utils.ids import id_text

Kind: TypeAlias = Literal["pandas", "polars", "arrow"]

ALLOWED = "Pass a pandas or polars DataFrame, an Arrow table, a DuckDB relation or a dict of columns."


def library(value: Any) -> str:
    """Return the name of the package that defines a value's class; pandas or polars also for subclasses of theirs."""
    packages = [one.__module__.partition(".")[0] for one in type(value).__mro__]
    return next((name for name in packages if name in ("pandas", "polars")), packages[0])


def kind_of(frame: Any) -> Kind:
    """Return the library that answers to this caller should use: Arrow for everything but pandas and polars.

    Examples
    --------
    >>> kind_of(pa.table({"a": [1]}))
    'arrow'
    """
    name = library(frame)
    return cast("Kind", name) if name in ("pandas", "polars") else "arrow"


def default_kind(recorded: str | None = None) -> Kind:
    """Return the library for answers where the caller passed no frame: the recorded one, else pandas, polars or Arrow."""
    for name in (recorded, "pandas", "polars"):
        if name == "arrow" or (name and importlib.util.find_spec(name)):
            return cast("Kind", name)
    return "arrow"


def as_kind(table: pa.Table, kind: Kind) -> Any:
    """Return an Arrow table as a frame of a library.

    Examples
    --------
    >>> as_kind(pa.table({"a": [1]}), "arrow").num_rows
    1
    """
    if kind == "pandas":
        return table.to_pandas()
    if kind == "polars":
        return importlib.import_module("polars").from_arrow(simple_columns(table, "The answer", []))  # polars has no UUIDs
    return table


def is_frame(value: Any) -> bool:
    """Return True if the value is a table, not a column, a list or a scalar."""
    if isinstance(value, pa.Table | pa.RecordBatch | pa.RecordBatchReader | Mapping):
        return True
    names = {one.__name__ for one in type(value).__mro__}
    if isinstance(value, pa.Array | pa.ChunkedArray | str | bytes) or names & {"Series", "Index"}:
        return False
    known = bool(names & {"DataFrame", "LazyFrame", "DuckDBPyRelation"})
    return known or (hasattr(value, "__arrow_c_stream__") and hasattr(value, "columns"))


def column_names(frame: Any, what: str) -> list[str]:
    """Return the names of a frame's columns, and of the index levels of a pandas frame that have names.

    Columns without a name, as a saved index becomes one, are left out.

    Raises
    ------
    DataError
        The value is not a frame, a name stands twice, or the columns have several levels.
    """
    try:
        names = _names(frame)
    except DataError:
        raise
    except Exception as error:  # libraries raise errors of their own for a closed file or connection
        raise DataError(f"{what} cannot be read: {' '.join(str(error).split())[:200]}. {ALLOWED}") from error
    if names is None:
        raise DataError(f"{what} is {_described(frame)}, not a table. {ALLOWED}")
    names = [name for name in names if name.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{what} has the column {twice[0]!r} twice. Each column needs its own name. Rename one of them.")
    return names


def _names(frame: Any) -> list[str] | None:
    if isinstance(frame, Mapping):
        return [str(name) for name in frame]
    if library(frame) == "pandas" and is_frame(frame):
        if getattr(frame.columns, "nlevels", 1) > 1:
            raise DataError(
                f"The columns of the frame have {frame.columns.nlevels} levels, such as {frame.columns[0]!r}. Each column needs "
                "one name. Join the levels: frame.columns = ['_'.join(names) for names in frame.columns]."
            )
        names = [str(name) for name in frame.columns]
        return names + [str(name) for name in frame.index.names if name is not None and str(name) not in names]
    if type(frame).__name__ == "LazyFrame":
        return list(frame.collect_schema().names())
    if isinstance(frame, pa.Table | pa.RecordBatch | pa.RecordBatchReader):
        return list(frame.schema.names)
    return [str(name) for name in frame.columns] if is_frame(frame) else None


def as_table(frame: Any, what: str, columns: Sequence[str] | None = None, *, required: Sequence[str] = ()) -> pa.Table:
    """Return a frame as an Arrow table.

    Parameters
    ----------
    what
        Name of the frame in errors.
    columns
        Columns to take; None: all.
    required
        Columns without which the frame is of no use. Others that Arrow cannot hold are left out, with a warning.

    Raises
    ------
    DataError
        The value is not a frame, a column is missing or mixes types, a name stands twice, or it cannot be read any more.
    """
    names = column_names(frame, what)
    chosen = names if columns is None else list(dict.fromkeys(columns))
    for name in (*chosen, *required):
        check_column(name, names, what)
    try:
        return simple_columns(_arrow(frame, what, chosen, required), what, required)
    except (DataError, KeyboardInterrupt):
        raise
    except Exception as error:  # libraries raise errors of their own for a closed file or connection
        raise DataError(f"{what} cannot be read: {' '.join(str(error).split())[:200]}. {ALLOWED}") from error


def _arrow(frame: Any, what: str, chosen: Sequence[str], required: Sequence[str]) -> pa.Table:
    if library(frame) == "pandas":
        return _from_pandas(frame, what, chosen, required)
    if isinstance(frame, Mapping):
        return _from_columns({str(name): values for name, values in frame.items()}, what, chosen, required)
    if library(frame) == "polars":
        found = frame.select(chosen)
        return (found.collect() if hasattr(found, "collect") else found).to_arrow()
    if library(frame) == "narwhals" and hasattr(frame, "collect"):
        frame = frame.collect("pyarrow")
    if isinstance(frame, pa.RecordBatch):
        frame = pa.Table.from_batches([frame])
    table = frame.read_all() if isinstance(frame, pa.RecordBatchReader) else frame
    if isinstance(frame, pa.RecordBatchReader) and not table.num_rows:
        raise DataError(f"{what} is a stream without rows; it may have been read before. Open it again, or pass a table.")
    return (table if isinstance(table, pa.Table) else pa.table(table)).select(chosen)


def once_readable(frame: Any, what: str) -> Any:
    """Return a frame that can be read twice: a stream becomes a table, and iterators of a dict become lists.

    Raises
    ------
    DataError
        A stream or an iterator has nothing left.
    """
    if isinstance(frame, pa.RecordBatchReader):
        return as_table(frame, what)
    if not isinstance(frame, Mapping):
        return frame
    try:
        return {name: listed(one, f"{what}[{name!r}]") if isinstance(one, Iterator) else one for name, one in frame.items()}
    except RequestError as error:
        raise DataError(str(error)) from None


def head(frame: Any, what: str, rows: int) -> Any:
    """Return the first rows of a frame, as a frame of its kind."""
    column_names(frame, what)  # raises for what is no frame
    if isinstance(frame, Mapping):
        return {name: _first(values, rows) for name, values in frame.items()}
    if isinstance(frame, pa.Table | pa.RecordBatch):
        return frame.slice(0, rows)
    for method in ("head", "limit"):
        if hasattr(frame, method):
            return getattr(frame, method)(rows)
    return as_table(frame, what)


def _first(values: Any, rows: int) -> Any:
    """Return the first values of a column, or the column as it is, if it has no slices."""
    try:
        return values[:rows]
    except (TypeError, KeyError, IndexError):
        return values


def check_column(name: str, names: Sequence[str], what: str) -> None:
    """Raise a `DataError` if a frame does not have a column."""
    if not isinstance(name, str):
        raise DataError(f"The column {name!r} of {what} is a {type(name).__name__}. Name a column by its text.")
    if name not in names:
        raise DataError(f"{what} has no column {name!r}.{nearest(name, names) if names else ' It has no columns.'}")


def id_list(values: Any, what: str) -> list[str]:
    """Return ids as texts, from one id, a list, a Series, an array or an iterator.

    Raises
    ------
    RequestError
        The value is not a list of ids, an id is missing, or an iterator has nothing left.

    Examples
    --------
    >>> id_list(7, "users"), id_list(np.array([1, 2]), "users")
    (['7'], ['1', '2'])
    """
    return [id_text(value, f"{what}[{number}]") for number, value in enumerate(listed(values, what))]


def listed(values: Any, what: str) -> list[Any]:
    """Return the elements of a list, a Series, an array, an iterator, or of one text or number.

    Raises
    ------
    RequestError
        The value is a table or a file, has more than one dimension, or is an iterator that has nothing left.
    """
    if is_frame(values):
        raise RequestError(f"{what} is a {type(values).__name__}. Expected a list, a Series or an array. Pass one of its columns.")
    if isinstance(values, str | bytes | type | pa.Scalar) or not (hasattr(values, "__iter__") or hasattr(values, "__array__")):
        return [values]
    if hasattr(values, "read") or isinstance(values, bytearray | memoryview):
        raise RequestError(f"{what} is {_described(values)}. Expected a list, a Series or an array. Read the ids first.")
    for method in ("to_pylist", "to_list", "tolist"):
        if hasattr(values, method):
            if getattr(values, "ndim", 1) > 1:
                raise RequestError(f"{what} has {values.ndim} dimensions. Expected a list of ids. Pass one column.")
            found = getattr(values, method)()
            return found if isinstance(found, list) else [found]
    found = list(cast("Iterable[Any]", values))
    if not found and isinstance(values, Iterator):
        raise RequestError(f"{what} is an iterator without elements; it may have been used before. Pass a list.")
    return found


def _described(value: Any) -> str:
    if isinstance(value, str | Path):
        return f"the path {str(value)!r}"
    if hasattr(value, "read"):
        return f"a{' closed' if getattr(value, 'closed', False) else 'n open'} file"
    if value is None:
        return "None"
    return f"a {library(value) + ' ' if library(value) in ('pandas', 'polars', 'numpy') else ''}{type(value).__name__}"


def _from_pandas(frame: Any, what: str, chosen: Sequence[str], required: Sequence[str]) -> pa.Table:
    columns = {str(name): frame.index.get_level_values(name).to_series() for name in frame.index.names if name is not None}
    columns |= {str(name): frame[name] for name in frame.columns if str(name) in chosen}
    return _from_columns(columns, what, chosen, required)


def _from_columns(columns: Mapping[str, Any], what: str, chosen: Sequence[str], required: Sequence[str]) -> pa.Table:
    arrays: dict[str, Any] = {}
    for name in chosen:
        try:
            arrays[name] = _array(name, columns[name], what)
        except DataError as error:
            if name in required or len(chosen) == 1:
                raise
            log.warning("%s The column is left out.", error)
    return _joined(arrays, what)


def _array(name: Any, values: Any, what: str) -> Any:
    """Return one column as an Arrow array."""
    try:
        if hasattr(values, "__arrow_array__") or library(values) == "pandas":
            sparse = type(getattr(values, "dtype", None)).__name__ == "SparseDtype"
            return pa.Array.from_pandas(np.asarray(values) if sparse else values)
        if library(values) == "polars":
            return values.to_arrow()
        return values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(listed(values, f"{what}[{name!r}]"))
    except RequestError as error:
        raise DataError(str(error)) from None
    except UnicodeError:
        raise DataError(f"The column {str(name)!r} of {what} has text that is not valid Unicode. Correct its values.") from None
    except OverflowError:
        raise DataError(f"The column {str(name)!r} of {what} has integers of more than 64 bits. Convert it to texts.") from None
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        kinds = sorted({type(value).__name__ for value in list(values)[:10_000] if value is not None})
        holds = "mixes types that no table can hold" if len(kinds) > 1 else "holds what no table can hold"
        raise DataError(f"The column {str(name)!r} of {what} {holds}: {', '.join(kinds)}. Convert it to one simple type.") from None


def _joined(arrays: Mapping[str, Any], what: str) -> pa.Table:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        sizes = ", ".join(f"{name} {length}" for name, length in list(lengths.items())[:4])
        raise DataError(f"The columns of {what} have different lengths: {sizes}. All must have the same.")
    return pa.table(dict(arrays))

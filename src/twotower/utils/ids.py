"""Convert ids between the type that the caller uses and the text that datasets and bundles store.

Inside the package an id is text. A dataset records the type that the ids had in the caller's table, so that answers have it again:
the integer 1 can be asked for as 1 or "1", and is answered as 1.
"""

from __future__ import annotations

import math
import re
from datetime import date
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.errors import RequestError
from twotower.schema import ITEM_ID, USER_ID

if TYPE_CHECKING:
    from twotower.utils.manifests import DatasetManifest

Id: TypeAlias = "str | int"

TEXT, CATEGORY, UUIDS = "string", "category", "uuid"
"""Names of id types besides those of Arrow, such as "int64", "large_string" or "decimal128(10, 0)"."""
WHOLE = re.compile(r"u?int\d+")
DECIMAL = re.compile(r"decimal128\((\d+), (\d+)\)")
ID_TYPE = b"twotower.id_type"
"""Key in the metadata of a column that became text: its type before."""


def id_type(field: pa.Field) -> str:
    """Return the name under which a manifest records the type of an id column.

    Examples
    --------
    >>> kinds = pa.int32(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.date32(), pa.bool_()
    >>> [id_type(pa.field("id", kind)) for kind in kinds]
    ['int32', 'large_string', 'category', 'date32[day]', 'string']
    """
    kind, types = field.type, pa.types
    if field.metadata and ID_TYPE in field.metadata:
        return str(field.metadata[ID_TYPE].decode())
    if types.is_dictionary(kind):
        return str(kind.value_type) if types.is_integer(kind.value_type) else CATEGORY
    moment = types.is_date(kind) or (types.is_timestamp(kind) and kind.tz is None)
    kept = types.is_integer(kind) or types.is_large_string(kind) or types.is_decimal128(kind) or moment
    return str(kind) if kept else TEXT


def id_types(manifest: DatasetManifest) -> dict[str, str]:
    """Return the id types of a dataset by column, from its manifest."""
    return {USER_ID: TEXT, ITEM_ID: TEXT, **manifest.id_types}


def id_text(value: Any, name: str = "id") -> str:
    """Return an id as text.

    Raises
    ------
    RequestError
        The value is missing (None, NaN) or not an id: a list, a frame, a truth value, any other object. Dates and UUIDs are ids.

    Examples
    --------
    >>> id_text(1), id_text("1"), id_text(1.0)
    ('1', '1', '1')
    """
    if isinstance(value, pa.Scalar):
        value = value.as_py()
    if isinstance(value, bytes):
        value = _decoded(value)
    if isinstance(value, str):
        return _unicode(str(value), name)
    if isinstance(value, bool | np.bool_) or value is None:
        raise RequestError(f"The {name} is {value}. An id is a text or an integer. Leave missing ids out.")
    if isinstance(value, Integral):
        return str(int(value))
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = None
    if number is not None:
        if not math.isfinite(number) or number != int(number):
            raise RequestError(f"The {name} is {value}. An id is a text or an integer. Leave missing ids out.")
        return str(int(number))
    if isinstance(value, date | UUID) and value == value:  # NaT is a date, and equals nothing
        return str(value)
    raise RequestError(f"The {name} is a {type(value).__name__}. An id is a text or an integer. Pass one id.")


def native_id(text: str, kind: str) -> Id:
    """Return a stored id in the type `kind` of `id_type`; text that is no integer stays text.

    Examples
    --------
    >>> native_id("7", "int64"), native_id("7", "string")
    (7, '7')
    """
    if not WHOLE.fullmatch(kind):
        return text
    try:
        return int(text)
    except ValueError:
        return text


def native_ids(column: pa.Array | pa.ChunkedArray, kind: str) -> pa.Array | pa.ChunkedArray:
    """Return stored ids as a column of the type `kind`; a column in which one is no such integer stays text.

    Examples
    --------
    >>> native_ids(pa.array(["1", "2"]), "int32").type, native_ids(pa.array(["1", "b"]), "int32").type
    (DataType(int32), DataType(string))
    """
    if kind == CATEGORY:
        return pc.dictionary_encode(column)
    return _cast(column, pa.type_for_alias(kind)) if WHOLE.fullmatch(kind) else column


def frame_ids(column: pa.Array | pa.ChunkedArray, kind: str) -> pa.Array | pa.ChunkedArray:
    """Return stored ids as a column of the type `kind` for a frame: as `native_ids`, and also UUIDs, decimals, dates and bytes.

    Examples
    --------
    >>> frame_ids(pa.array(["2024-01-31"]), "date32[day]").to_pylist(), frame_ids(pa.array(["7"]), "decimal128(9, 0)").to_pylist()
    ([datetime.date(2024, 1, 31)], [Decimal('7')])
    """
    if kind in (TEXT, CATEGORY) or WHOLE.fullmatch(kind):
        return native_ids(column, kind)
    if kind == UUIDS:
        try:
            return pa.array([UUID(one) for one in column.to_pylist()], pa.uuid())
        except ValueError:
            return column
    sizes = DECIMAL.fullmatch(kind)
    return _cast(column, pa.decimal128(int(sizes[1]), int(sizes[2])) if sizes else pa.type_for_alias(kind))


def _cast(column: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    try:
        return column.cast(kind)
    except pa.ArrowInvalid:
        return column


def _decoded(value: bytes) -> Any:
    """Return the text of bytes, or the bytes if they are none in UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _unicode(text: str, name: str) -> str:
    """Return a text that tables can hold."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError(f"The {name} is {text[:80]!a}, which is not valid Unicode. Correct the id.") from None
    return text

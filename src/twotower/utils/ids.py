"""Convert ids between the type that the caller uses and the text that datasets and bundles store.

Inside the package an id is text. A dataset records the type that the ids had in the caller's table, so that answers have it again:
the integer 1 can be asked for as 1 or "1", and is answered as 1.
"""

from __future__ import annotations

import math
from datetime import date
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import UUID

import pyarrow as pa
import pyarrow.compute as pc

from twotower.errors import RequestError
from twotower.schema import ITEM_ID, USER_ID

if TYPE_CHECKING:
    from twotower.utils.manifests import DatasetManifest

Id: TypeAlias = "str | int"

TEXT, CATEGORY = "string", "category"
"""Names of id types besides the integer types of Arrow ("int64", "uint8", …)."""


def id_type(kind: pa.DataType) -> str:
    """Return the name under which a manifest records the type of an id column.

    Examples
    --------
    >>> id_type(pa.int32()), id_type(pa.large_string()), id_type(pa.dictionary(pa.int8(), pa.string()))
    ('int32', 'string', 'category')
    """
    if pa.types.is_dictionary(kind):
        return str(kind.value_type) if pa.types.is_integer(kind.value_type) else CATEGORY
    return str(kind) if pa.types.is_integer(kind) else TEXT


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
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool) or value is None:
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
    if kind in (TEXT, CATEGORY):
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
    if kind == TEXT:
        return column
    try:
        return column.cast(pa.type_for_alias(kind))
    except pa.ArrowInvalid:
        return column

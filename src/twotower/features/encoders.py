"""Encode static features of items and users as arrays, with one rule per kind of feature.

Raw tables (pyarrow) hold the training rows first. Fitting reads only those, so later rows change no vocabulary and no statistic.
Encoding gives numpy arrays over all rows, including the two reserved ones. Encoders are saved as JSON and safetensors, so that
new items are encoded exactly as training items.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from twotower.errors import DataError
from twotower.features.texts import TFIDF, Texts, fit_text, read_texts, text_vectors
from twotower.schema import FIRST_ROW, HOURS_PER_WEEK, UNKNOWN, FeatureSpec
from twotower.utils.array_files import open_arrays, write_arrays
from twotower.utils.types import Array, Float, Float64, Int

CELL_DEGREES = (0.1, 0.02)  # coarse and fine cells: about 11 and 2 km
MAX_VALUES = 64  # largest number of values kept of a multi-valued feature
ELITE_BASE_YEAR = 2000


@dataclass(frozen=True)
class Encoders:
    """Fitted encoders: everything that is needed to encode further rows.

    Attributes
    ----------
    specs
        The declared features.
    vocabularies
        "side.name" → known values; value i has row i + 2. Cells of "geo" features are integers.
    statistics
        "side.name" → [mean, standard deviation] of a number, [largest number of values] of a multi-valued feature, [width] of a
        vector (0: no training row has one).
    arrays
        Text: "side.name.components" and so on, see `fit_text`.
    text_encoder
        See `read_texts`.
    """

    specs: tuple[FeatureSpec, ...]
    vocabularies: dict[str, list[Any]] = field(default_factory=dict)
    statistics: dict[str, list[float]] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)
    text_encoder: str = TFIDF

    def save(self, folder: Path) -> None:
        """Write `encoders.json` and `encoders.safetensors` into `folder`."""
        specs = [asdict(spec) for spec in self.specs]
        body = {"specs": specs, "vocabularies": self.vocabularies, "statistics": self.statistics}
        body |= {} if self.text_encoder == TFIDF else {"text_encoder": self.text_encoder}
        (folder / "encoders.json").write_text(json.dumps(body, ensure_ascii=False, sort_keys=True, indent=0))
        write_arrays(folder / "encoders.safetensors", self.arrays)

    @classmethod
    def load(cls, folder: Path) -> Encoders:
        """Return the encoders that `save` wrote into `folder`."""
        body = json.loads((folder / "encoders.json").read_text())
        specs = tuple(FeatureSpec(**{**spec, "columns": tuple(spec["columns"])}) for spec in body["specs"])
        arrays = open_arrays(folder / "encoders.safetensors")
        return cls(specs, body["vocabularies"], body["statistics"], arrays, body.get("text_encoder", TFIDF))


def fit_encoders(
    specs: tuple[FeatureSpec, ...],
    items: pa.Table,
    users: pa.Table,
    *,
    n_train_items: int,
    n_train_users: int,
    item_text: Texts | None = None,
    text_dim: int = 32,
    text_encoder: str = TFIDF,
    seed: int = 0,
) -> Encoders:
    """Return encoders with vocabularies, statistics and text components fitted on the training rows only.

    Parameters
    ----------
    specs
        Declared features; their columns must exist in the tables.
    items, users
        Raw tables, training rows first.
    item_text
        One string per item, or the result of `read_texts`, for the first "text" feature of the items (only training rows are
        used). Other text features use their column.
    text_dim
        Width of the text vectors.
    text_encoder
        See `read_texts`.
    seed
        Seed of the truncated SVD of the texts.
    """
    encoders = Encoders(specs, text_encoder=text_encoder)
    trained = {"item": items.slice(0, n_train_items), "user": users.slice(0, n_train_users)}
    for spec in specs:
        key, table = f"{spec.side}.{spec.name}", trained[spec.side]
        if spec.kind in ("categorical", "multi"):
            encoders.vocabularies[key] = _vocabulary(table[spec.columns[0]], multi=spec.kind == "multi")
            if spec.kind == "multi":
                longest = pc.max(pc.list_value_length(table[spec.columns[0]])).as_py() or 1
                encoders.statistics[key] = [min(longest, MAX_VALUES)]
        elif spec.kind == "geo":
            for scale, cells in enumerate(_cells(_locations(table, spec)).T):
                encoders.vocabularies[f"{key}.{scale}"] = sorted({int(cell) for cell in cells if cell >= 0})
        elif spec.kind == "number":
            values = _floats(table[spec.columns[0]])
            known = values[np.isfinite(values)]
            std = float(known.std()) if len(known) else 1.0
            encoders.statistics[key] = [float(known.mean()) if len(known) else 0.0, std or 1.0]
        elif spec.kind == "text":
            texts = item_text if item_text is not None and spec is _main_text(specs) else table[spec.columns[0]].to_pylist()
            read = read_texts(texts, text_encoder)[: len(table)]
            encoders.arrays.update({f"{key}.{name}": array for name, array in fit_text(read, text_dim, seed).items()})
        elif spec.kind == "vector":
            encoders.statistics[key] = [max(_widths(table[spec.columns[0]], spec), default=0)]
    return encoders


def grow_encoders(encoders: Encoders, items: pa.Table, users: pa.Table, *, n_train_items: int, n_train_users: int) -> Encoders:
    """Return encoders that also know the values of further training rows.

    A known value keeps its row; new ones follow, sorted. Statistics and text components stay as they are, and so does a vocabulary
    of locations without a cell, which no model reads. The parameters are those of `fit_encoders`.

    Examples
    --------
    >>> spec = FeatureSpec(name="brand", side="item", kind="categorical", columns=("brand",))
    >>> table, none = pa.table({"brand": ["Uji", "Assam"]}), pa.table({})
    >>> grow_encoders(Encoders((spec,), {"item.brand": ["Uji"]}), table, none, n_train_items=2, n_train_users=0).vocabularies
    {'item.brand': ['Uji', 'Assam']}
    """
    trained, grown = {"item": items.slice(0, n_train_items), "user": users.slice(0, n_train_users)}, {}
    for key, known in encoders.vocabularies.items():
        spec, _, scale = next(parts for spec in encoders.specs if (parts := _vocabulary_of(spec, key)))
        if spec.kind == "geo":
            cells = _cells(_locations(trained[spec.side], spec))[:, int(scale)] if known else np.zeros(0, np.int64)
            found: list[Any] = sorted({int(cell) for cell in cells if cell >= 0})
        else:
            found = _vocabulary(trained[spec.side][spec.columns[0]], multi=spec.kind == "multi")
        seen = set(known)
        grown[key] = [*known, *(value for value in found if value not in seen)]
    return replace(encoders, vocabularies=grown)


def _vocabulary_of(spec: FeatureSpec, key: str) -> tuple[FeatureSpec, str, str] | None:
    """Return the feature with its key and scale ("" if it has none) if the vocabulary `key` is one of its own."""
    own = f"{spec.side}.{spec.name}"
    if spec.kind == "geo":
        name, _, scale = key.rpartition(".")
        return (spec, own, scale) if name == own else None
    return (spec, own, "") if key == own else None


def encode_items(encoders: Encoders, items: pa.Table, item_text: Texts | None = None) -> dict[str, Array]:
    """Return one or more arrays [2 + len(items), …] per item feature; the kinds are described in `_encode`."""
    return _encode_side(encoders, "item", items, item_text)


def encode_users(encoders: Encoders, users: pa.Table) -> dict[str, Array]:
    """Return arrays over all user rows: the features, "since_s" int64 (0: unknown) and "elite" int64 (bit y: year 2000 + y)."""
    arrays = _encode_side(encoders, "user", users, None)
    if "since_s" in users.column_names:
        arrays["since_s"] = _reserve(pc.fill_null(users["since_s"].cast(pa.int64()), 0).to_numpy())
    if "elite" in users.column_names:
        arrays["elite"] = _reserve(_year_bits(users["elite"]))
    return arrays


def cell_rows(encoders_cells: tuple[Array, Array], locations: Array) -> Int:
    """Return rows int64 [n, 2] of the coarse and fine cells of `locations` [n, 2] (degrees); UNKNOWN without a known cell."""
    return np.stack([_lookup_int(known, cells) for known, cells in zip(encoders_cells, _cells(locations).T, strict=True)], axis=1)


def _encode_side(encoders: Encoders, side: str, table: pa.Table, text: Texts | None) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for spec in encoders.specs:
        if spec.side == side:
            arrays |= _encode(encoders, spec, table, text if spec is _main_text(encoders.specs) else None)
    return arrays


def _main_text(specs: tuple[FeatureSpec, ...]) -> FeatureSpec | None:
    """Return the feature that reads the collected text of the items, or None."""
    return next((spec for spec in specs if spec.side == "item" and spec.kind == "text"), None)


def _encode(encoders: Encoders, spec: FeatureSpec, table: pa.Table, text: Texts | None) -> dict[str, Array]:
    """Return the arrays of one feature by name.

    categorical: int32 [n]; multi: int32 [n, width]; number: float32 [n, 2] (value, missing); geo: cells int32 [n, 2], and under
    "NAME.degrees" float32 [n, 2]; hours: float32 [n, 168]; text and vector: float32 [n, dim]. The two reserved rows come first:
    PAD is zeros (NaN for degrees), UNKNOWN is encoded as a row without a value.
    """
    key = f"{spec.side}.{spec.name}"
    if spec.kind == "geo":
        locations = _locations(table, spec)
        known = tuple(np.array(encoders.vocabularies[f"{key}.{scale}"], np.int64) for scale in range(2))
        cells = _reserve(cell_rows((known[0], known[1]), locations).astype(np.int32), UNKNOWN)
        return {spec.name: cells, f"{spec.name}.degrees": _reserve(locations.astype(np.float32), np.nan, pad=np.nan)}
    if spec.kind == "text" and text is not None:
        return {spec.name: _reserve(_text_of(encoders, key, text))}
    column = table[spec.columns[0]].combine_chunks()
    if spec.kind == "categorical":
        return {spec.name: _reserve(_lookup(encoders.vocabularies[key], column.cast(pa.string())).astype(np.int32), UNKNOWN)}
    if spec.kind == "multi":
        bags = _bags(encoders.vocabularies[key], column, int(encoders.statistics[key][0]))
        return {spec.name: _reserve(bags, [UNKNOWN, *[0] * (bags.shape[1] - 1)])}
    if spec.kind == "number":
        mean, std = encoders.statistics[key]
        values = _floats(column)
        missing = ~np.isfinite(values)
        scaled = np.where(missing, 0.0, np.clip((values - mean) / std, -10, 10))
        return {spec.name: _reserve(np.stack([scaled, missing], axis=1).astype(np.float32), [0, 1])}
    if spec.kind == "hours":
        return {spec.name: _reserve(_bits(column), 0.5)}
    if spec.kind == "text":
        return {spec.name: _reserve(_text_of(encoders, key, column.to_pylist()))}
    return {spec.name: _reserve(_vectors(column, spec, int(encoders.statistics[key][0])))}


def _reserve(values: Array, unknown: Any = 0, *, pad: float = 0) -> Array:
    """Return `values` with the two reserved rows in front."""
    head = np.full((FIRST_ROW, *values.shape[1:]), pad, values.dtype)
    head[UNKNOWN] = unknown
    return np.concatenate([head, values])


def _widths(column: Any, spec: FeatureSpec, *expected: int) -> set[int]:
    """Return the width of the vectors of a column as a set of at most one; null and empty vectors are ignored."""
    found = {int(width) for width in pc.unique(pc.list_value_length(column)).to_pylist() if width} | set(expected)
    if len(found) > 1:
        raise DataError(
            f"Feature {spec.name!r} of the {spec.side}s has vectors of {', '.join(map(str, sorted(found)))} numbers. "
            f"All vectors of a feature must have the same width. Correct the column {spec.columns[0]!r}."
        )
    return found


def _vectors(column: pa.Array, spec: FeatureSpec, width: int) -> Float:
    """Return vectors [n, width], zeros for rows without one; [n, 1] zeros if no training row has a vector."""
    vectors = np.zeros((len(column), max(width, 1)), np.float32)
    if width:
        _widths(column, spec, width)
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        vectors[lengths > 0] = _floats(pc.list_flatten(column)).reshape(-1, width)
    return vectors


def _vocabulary(column: pa.ChunkedArray, *, multi: bool) -> list[str]:
    values = pc.list_flatten(column) if multi else column
    return sorted(value for value in pc.unique(values.cast(pa.string())).to_pylist() if value)


def _lookup(vocabulary: list[str], values: pa.Array) -> Int:
    """Return rows of string values: position in the vocabulary + 2, or UNKNOWN."""
    found = pc.index_in(values, value_set=pa.array(vocabulary, pa.string()), skip_nulls=True)
    return np.asarray(pc.fill_null(found, UNKNOWN - FIRST_ROW).to_numpy(zero_copy_only=False), np.int64) + FIRST_ROW


def _lookup_int(known: Array, values: Array) -> Int:
    if not len(known):
        return np.full(len(values), UNKNOWN, np.int64)
    order = np.argsort(known, kind="stable")  # an update appends cells
    at = order[np.minimum(np.searchsorted(known, values, sorter=order), len(known) - 1)]
    return np.where(known[at] == values, at + FIRST_ROW, UNKNOWN).astype(np.int64)


def _bags(vocabulary: list[str], column: pa.Array, width: int) -> NDArray[np.int32]:
    """Return the first `width` known values of each list, padded with 0; a list with only unknown values becomes [UNKNOWN]."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(column)), lengths)
    rows = _lookup(vocabulary, pc.list_flatten(column).cast(pa.string()))
    bags = np.zeros((len(column), width), np.int32)
    bags[np.unique(owner), 0] = UNKNOWN
    known = rows != UNKNOWN
    owner, rows = owner[known], rows[known]
    slot = np.arange(len(owner)) - np.searchsorted(owner, owner)
    kept = slot < width
    bags[owner[kept], slot[kept]] = rows[kept]
    return bags


def _floats(column: Any) -> Float64:
    values = column.cast(pa.float64())
    return np.asarray(pc.fill_null(values, float("nan")).to_numpy(), np.float64)


def _locations(table: pa.Table, spec: FeatureSpec) -> Float64:
    locations = np.stack([_floats(table[name]) for name in spec.columns], axis=1)
    return np.where(np.isfinite(locations).all(axis=1, keepdims=True), locations, np.nan)  # both coordinates or none


def _cells(locations: Array) -> Int:
    """Return cell numbers [n, 2], coarse and fine; -1 if the location is unknown."""
    cells = []
    for size in CELL_DEGREES:
        row, column = np.floor((locations[:, 0] + 90) / size), np.floor((locations[:, 1] + 180) / size)
        cells.append(np.nan_to_num(row * 100_000 + column, nan=-1).astype(np.int64))
    return np.stack(cells, axis=1)


def _bits(column: pa.Array) -> Float:
    """Return float32 [n, 168] from strings of 168 characters 0/1; unknown hours are 0.5."""
    text = pc.fill_null(column, "").to_pylist()
    bits = np.full((len(text), HOURS_PER_WEEK), 0.5, np.float32)
    known = [i for i, value in enumerate(text) if len(value) == HOURS_PER_WEEK]
    if known:
        joined = np.frombuffer("".join(text[i] for i in known).encode(), np.uint8)
        bits[known] = (joined.reshape(-1, HOURS_PER_WEEK) - ord("0")).astype(np.float32)
    return bits


def _year_bits(column: pa.ChunkedArray) -> Int:
    array = column.combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    years = pc.list_flatten(array).to_numpy(zero_copy_only=False).astype(np.int64)
    bits = np.zeros(len(array), np.int64)
    np.bitwise_or.at(bits, np.repeat(np.arange(len(array)), lengths), np.int64(1) << np.clip(years - ELITE_BASE_YEAR, 0, 62))
    return bits


def _text_of(encoders: Encoders, key: str, texts: Texts) -> Float:
    arrays = {name.removeprefix(f"{key}."): array for name, array in encoders.arrays.items() if name.startswith(f"{key}.")}
    return text_vectors(arrays, read_texts(texts, encoders.text_encoder))

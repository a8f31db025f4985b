"""Export both towers to ONNX, and run the user tower with ONNX Runtime.

`user.onnx` and `item.onnx` have dynamic batch sizes and history lengths:

    user.onnx   "items" float32 [n, d]: history token of each item; "history", "event_type", "stars", "gap" int64 [B, W];
                "seen" int64 [B]; "user" float32 [B, d]: embedding of the user's id; "field.NAME" [B, …]
                →   "vectors" float32 [B, D]
    item.onnx   "row" int64 [n]; "field.NAME" [n, …]            →   "vectors" float32 [n, D], "history_items" float32 [n, d]

To rank, multiply the user vector by the weight of the towers and append the columns of `models.priors` ("priors" of the
bundle's manifest); the item vectors of the bundle have theirs. Add the vectors of the last items of the history ("recency" times
"temperature"). If seen items may be recommended again, add a bonus ("repeats" times "temperature") to the scores of the items of
the history; see `models.history_terms`.

The vectors equal those of PyTorch to 1e-5. A request reads no item features: the items of its history are rows of "items". Neither
graph has the table of user ids, which can be larger than all other weights together: row r of "tables.user/id.weight" in the
weights of the bundle belongs to user row r, unless the table is hashed.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.errors import DataError
from twotower.features.batches import ItemBatch, UserBatch
from twotower.features.feature_store import WIDTHS, FeatureStore
from twotower.models.layers.tables import RowTable, Table
from twotower.models.two_tower import TwoTower
from twotower.retriever import Queries
from twotower.schema import PAD, UNKNOWN
from twotower.utils.types import Array, Float, Int

USER_FILE, ITEM_FILE = "user.onnx", "item.onnx"
USER_TABLE = "user.id"
OPSET = 18
MAX_GRAPH_BYTES = 2**31 - 2**24  # weights in one file, with some room for the graph itself
BATCH_BY_LENGTH_FROM = 64  # from this batch size on, several calls grouped by history length are faster than one
WIDE = ("history", "event_type", "stars", "gap")  # inputs [B, W]


def hindrance(model: TwoTower) -> str | None:
    """Return a sentence that says why the model cannot be exported to ONNX; None if it can."""
    if importlib.util.find_spec("onnx") is None:
        return "The package onnx is not installed. Install two-tower-rec[serve] and export again."
    size = 4 * sum(value.numel() for name, value in model.state_dict().items() if not name.startswith("tables.user/id."))
    return (
        None
        if size < MAX_GRAPH_BYTES
        else f"The weights take {size / 1e9:.1f} GB; an ONNX file can hold {MAX_GRAPH_BYTES / 1e9:.1f} GB."
    )


def can_run() -> bool:
    """Return True if ONNX Runtime is installed, and onnx, which checks the graph."""
    return all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxruntime"))


def export_towers(model: TwoTower, store: FeatureStore, folder: Path) -> None:
    """Write both graphs of `model` into the new folder `folder`. `store` gives the example inputs."""
    folder.mkdir()
    plain = _plain(model)
    row = np.full(2, UNKNOWN)
    user = store.padded(Queries.of([[UNKNOWN] * 3, [UNKNOWN]], time_s=0))
    user["user"] = user_vectors(model, user["user"])
    with torch.no_grad():
        items = plain.history_items(store.items(np.arange(UNKNOWN + 1)))
    _write(_UserGraph, plain, {"items": items.numpy(), **user}, ("vectors",), folder / USER_FILE)
    _write(_ItemGraph, plain, item_input(store.items(row, np.zeros_like(row))), ("vectors", "history_items"), folder / ITEM_FILE)


def item_input(batch: ItemBatch) -> dict[str, Array]:
    """Return the inputs of `item.onnx` for a batch."""
    return {"row": batch.row.numpy(), **{f"field.{name}": value.numpy() for name, value in batch.fields.items()}}


@torch.inference_mode()
def user_vectors(model: TwoTower, rows: Int) -> Float:
    """Return the embeddings float32 [B, d] of the ids of user rows int64 [B]."""
    vectors: Float = model.tables.lookup(USER_TABLE)(torch.from_numpy(rows)).float().numpy(force=True)
    return vectors


def refuse_external_data(graph: bytes, file: Path) -> None:
    """Raise DataError if a tensor of an ONNX graph, of its functions or subgraphs included, lies in another file.

    Such a file could be any file of this machine, and whether the runtime reads it depends on its version.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        unread: list[Any] = [onnx.ModelProto.FromString(graph)]
    except DecodeError:
        raise DataError(f"{file} is not an ONNX graph. Run `twotower export` again.") from None
    while unread:
        message = unread.pop()
        if isinstance(message, onnx.TensorProto):
            if message.external_data or message.data_location == onnx.TensorProto.EXTERNAL:
                raise DataError(f"{file} refers to data in another file. Do not use this bundle.")
            continue  # it holds no other tensor, and its fields would be copied
        for field, value in message.ListFields():
            if field.message_type is not None:
                unread.extend(value if isinstance(value, Sequence) else [value])


class OnnxUserTower:
    """Runs `user.onnx` with ONNX Runtime.

    Parameters
    ----------
    model
        Its table of user ids is used.
    items
        float32 [n_item_rows, d]: history token of each item.
    threads
        Threads of one call. The towers are small: one thread is fastest and leaves the other cores to other requests.
    """

    def __init__(self, file: Path, model: TwoTower, items: Float, *, threads: int = 1) -> None:
        import onnxruntime

        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        graph = file.read_bytes()
        refuse_external_data(graph, file)
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._names = [value.name for value in self._session.get_inputs()]
        self._model, self._items = model, items

    def with_items(self, items: Float) -> OnnxUserTower:
        """Return the same tower with other history tokens."""
        other = copy.copy(self)
        other._items = items
        return other

    def __call__(self, inputs: Mapping[str, Array]) -> Float:
        """Return vectors float32 [B, D] for the inputs from `FeatureStore.padded`.

        Large batches are grouped by history length, so that short histories are not padded to the longest.
        """
        seen = inputs["seen"]
        if len(seen) < BATCH_BY_LENGTH_FROM:
            return self._run(inputs)
        parts, group = [], np.searchsorted(WIDTHS, seen)
        order = np.argsort(group, kind="stable")
        for at in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
            width = max(int(seen[at].max()), 1)
            parts.append(self._run({name: value[at, :width] if name in WIDE else value[at] for name, value in inputs.items()}))
        vectors: Float = np.concatenate(parts)[np.argsort(order)]
        return vectors

    def _run(self, inputs: Mapping[str, Array]) -> Float:
        given = {**inputs, "items": self._items, "user": user_vectors(self._model, inputs["user"])}
        vectors: Float = self._session.run(["vectors"], {name: given[name] for name in self._names})[0]
        return vectors


class _StoredTable(Table):
    """Frozen copy of a table of any kind, for exported graphs: one float32 matrix."""

    def __init__(self, table: Table) -> None:
        nn.Module.__init__(self)
        self.ids, self.rows, self.hashing = table.ids, table.rows, table.hashing
        weight = table.weight.detach().float()
        self.register_buffer("weight", weight * table.scale.float() if isinstance(table, RowTable) else weight)

    def mean(self, ids: Tensor) -> Tensor:
        """Return the mean vectors, as `Table.mean`, with operations that every runtime has."""
        at = ids if self.hashing is None else self.hashing.rows_of(ids).flatten(1)
        known = (at != PAD)[..., None].to(self.weight.dtype)
        mean = (F.embedding(at, self.weight) * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)
        return mean if self.hashing is None else 2 * mean


class _GivenVectors(Table):
    """Stands for a table in an exported graph whose caller looks up the vectors."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the vectors [n, d] that are given instead of ids."""
        return vectors


class _UserGraph(nn.Module):
    def __init__(self, model: TwoTower, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        given = dict(zip(self.names, values, strict=True))
        size, width = given["history"].shape
        batch = UserBatch(
            items=ItemBatch(given["history"], {}),
            widths=((size, width),),
            at=torch.arange(size) * width + (given["seen"] - 1).clamp(min=0),
            seen=given["seen"],
            user_row=given["user"],  # vectors, which `_GivenVectors` passes on
            fields=_fields(given),
            **{name: given[name].flatten() for name in WIDE},
        )
        vectors: Tensor = self.model.user_tower(self.model.user_fields(batch), given["items"], batch)
        return vectors


class _ItemGraph(nn.Module):
    def __init__(self, model: TwoTower, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(self.names, values, strict=True))
        batch = ItemBatch(given["row"], _fields(given))
        return self.model.encode_items(batch), self.model.history_items(batch)


def _fields(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("field."): value for name, value in given.items() if name.startswith("field.")}


def _plain(model: TwoTower) -> TwoTower:
    """Return a copy on the CPU whose embedding tables are float32 matrices, that of user ids left out."""
    given, tables = model.tables.lookup(USER_TABLE), [model.tables.lookup(name) for name in model.tables]
    instead: dict[int, Any] = {id(table): _GivenVectors() if table is given else _StoredTable(table) for table in tables}
    return copy.deepcopy(model, instead).cpu().float().eval()  # the tables, most of the memory, are not copied twice


def _write(
    graph: type[_UserGraph] | type[_ItemGraph],
    model: TwoTower,
    inputs: Mapping[str, Array],
    outputs: tuple[str, ...],
    file: Path,
) -> None:
    names = tuple(inputs)
    axes = {name: {0: "items" if name == "items" else "batch"} | ({1: "width"} if name in WIDE else {}) for name in names}
    axes |= {name: {0: "batch"} for name in outputs}
    with warnings.catch_warnings(), torch.no_grad():
        # Use tracing: the newer exporter makes the same graph but takes seconds instead of 0.2 s.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph(model, names),
            tuple(torch.from_numpy(np.ascontiguousarray(value)) for value in inputs.values()),
            str(file),
            input_names=list(names),
            output_names=list(outputs),
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )

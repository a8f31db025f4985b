"""Both towers as ONNX: graphs that any runtime answers with, and the user tower run through ONNX Runtime.

Enters: a trained model. Leaves: `user.onnx` and `item.onnx`, every size of batch and history left open.

    user.onnx   "items" float32 [n, d]: what a history reads of each item; "history", "event_type", "stars", "gap" int64 [B, W];
                "seen", "user" int64 [B]; "field.NAME" [B, …]   →   "vectors" float32 [B, D]
    item.onnx   "row" int64 [n]; "field.NAME" [n, …]            →   "vectors" float32 [n, D], "history_items" float32 [n, d]

To rank, a user's vector takes one more number, what a nat of log popularity is worth ("popularity_weight" of the bundle's
manifest), and an item's its log popularity; see `item_arrays`. Where visited items may be recommended again, the vectors of the
last ones are added first, by "recent_item_weight"; see `reranking.boost_recent_items`.

Promise: the vectors are PyTorch's to 1e-5. A request touches no feature of an item: those of its history are rows of "items".
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from twotower.features.batches import ItemBatch, UserBatch
from twotower.features.feature_store import WIDTHS, FeatureStore
from twotower.models.layers.tables import StoredTable
from twotower.models.two_tower import TwoTower
from twotower.retriever import Queries
from twotower.schema import UNKNOWN
from twotower.utils.types import Float

USER_FILE, ITEM_FILE = "user.onnx", "item.onnx"
OPSET = 18
MAX_GRAPH_BYTES = 2**31 - 2**24  # of one file, with some room for the graph itself
BATCH_BY_LENGTH_FROM = 64  # requests from which on several calls of equal length cost less than one
WIDE = ("history", "event_type", "stars", "gap")  # inputs [B, W]


def hindrance(model: TwoTower) -> str | None:
    """Why the model cannot be written as ONNX graphs, as a sentence; None where it can."""
    if importlib.util.find_spec("onnx") is None:
        return "Install two-tower-rec[serve] and export again to have them."
    size = 4 * sum(value.numel() for value in model.state_dict().values())
    return (
        None
        if size < MAX_GRAPH_BYTES
        else f"Its tables take {size / 1e9:.1f} GB, and an ONNX file holds {MAX_GRAPH_BYTES / 1e9:.1f} GB."
    )


def can_run() -> bool:
    """Whether ONNX Runtime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def export_towers(model: TwoTower, store: FeatureStore, folder: Path) -> None:
    """Write both graphs of `model`, which reads what `store` makes, into the new folder `folder`."""
    folder.mkdir()
    plain = _plain(model)
    row = np.full(2, UNKNOWN)
    user = store.padded(Queries.of([[UNKNOWN] * 3, [UNKNOWN]], time_s=0))
    with torch.no_grad():
        items = plain.history_items(store.items(np.arange(UNKNOWN + 1)))
    _write(_UserGraph, plain, {"items": items.numpy(), **user}, ("vectors",), folder / USER_FILE)
    _write(_ItemGraph, plain, item_input(store.items(row, np.zeros_like(row))), ("vectors", "history_items"), folder / ITEM_FILE)


def item_input(batch: ItemBatch) -> dict[str, NDArray[Any]]:
    """What `item.onnx` reads of a batch."""
    return {"row": batch.row.numpy(), **{f"field.{name}": value.numpy() for name, value in batch.fields.items()}}


class OnnxUserTower:
    """`user.onnx` behind ONNX Runtime.

    Parameters
    ----------
    items
        float32 [n_items, d]: what a history reads of each item.
    threads
        Of one call. The towers are small: one thread answers soonest, and leaves the other cores to other requests.
    """

    def __init__(self, file: Path, items: Float, *, threads: int = 1) -> None:
        import onnxruntime

        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._names = [value.name for value in self._session.get_inputs()]
        self._items = items

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Float:
        """Vectors float32 [B, D] of what `FeatureStore.padded` returned; many at once by length, so that short histories cost
        what they hold."""
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

    def _run(self, inputs: Mapping[str, NDArray[Any]]) -> Float:
        given = {**inputs, "items": self._items}
        vectors: Float = self._session.run(["vectors"], {name: given[name] for name in self._names})[0]
        return vectors


class _UserGraph(nn.Module):
    def __init__(self, model: TwoTower, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        given = dict(zip(self.names, values, strict=True))
        size, width = given["history"].shape
        batch = UserBatch(
            items=ItemBatch(given["user"], {}),
            widths=((size, width),),
            at=torch.arange(size) * width + (given["seen"] - 1).clamp(min=0),
            seen=given["seen"],
            user_row=given["user"],
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
    """A copy on the CPU whose tables are float32 matrices."""
    tables: dict[int, Any] = {id(table): StoredTable(model.tables.lookup(name)) for name, table in model.tables.items()}
    return copy.deepcopy(model, tables).cpu().float().eval()  # the tables, by far the most of it, are not copied twice


def _write(
    graph: type[_UserGraph] | type[_ItemGraph],
    model: TwoTower,
    inputs: Mapping[str, NDArray[Any]],
    outputs: tuple[str, ...],
    file: Path,
) -> None:
    names = tuple(inputs)
    axes = {name: {0: "items" if name == "items" else "batch"} | ({1: "width"} if name in WIDE else {}) for name in names}
    axes |= {name: {0: "batch"} for name in outputs}
    with warnings.catch_warnings(), torch.no_grad():
        # By tracing: the newer exporter makes the same graph, and takes seconds for it where this takes a fifth of one.
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

"""Compare two models that were fitted on the same data: paired intervals, and the lists that changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from twotower.bundle.bundle import load_trained
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store, split_moment
from twotower.data.held_out import HeldOut
from twotower.errors import DataError
from twotower.evaluation.evaluator import judge
from twotower.evaluation.insights import relative
from twotower.models.neural_retriever import NeuralRetriever
from twotower.pipeline.run_folder import run_dataset
from twotower.schema import FIRST_ROW, ITEM_ID, USER_ID
from twotower.utils.frames import Kind, as_kind
from twotower.utils.ids import frame_ids, id_types
from twotower.utils.types import Int

if TYPE_CHECKING:
    from twotower.api.model import Model

FIRST, SECOND = "a", "b"
LISTS, LIST_LENGTH, CHANGED_LISTS = 1000, 10, 5


@dataclass(frozen=True)
class Comparison:
    """Two models on the same test queries.

    Attributes
    ----------
    metric
        The metric that decides.
    values, differences
        By metric: the values {"a", "b"}, and a minus b {"value", "low", "high"} with its paired 95 % interval.
    overlap
        Mean share of equal items in the first ten of both lists, over at most 1,000 queries.
    changed
        Share of those queries whose first ten differ.
    lists
        Table of the lists that changed most: "user", "rank", "a" and "b", item ids.
    """

    metric: str
    values: dict[str, dict[str, float]]
    differences: dict[str, dict[str, float]]
    overlap: float
    changed: float
    lists: Any
    kind: Kind = "arrow"

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        gap, (one, other) = self.differences[self.metric], self.values[self.metric].values()
        sizes = (
            f"{one:.4f} against {other:.4f}; difference {gap['value']:+.4f}, 95 % interval {gap['low']:+.4f} to {gap['high']:+.4f}"
        )
        if gap["low"] <= 0 <= gap["high"]:
            return f"A tie: {self.metric} of a is {relative(one, other)} that of b ({sizes})."
        return f"{'Better' if gap['low'] > 0 else 'Worse'}: {self.metric} of a is {relative(one, other)} that of b ({sizes})."

    def frame(self) -> Any:
        """Return a row per metric: "metric", "a", "b", "difference", "low", "high"."""
        rows = [
            {"metric": name, **self.values[name], "difference": gap["value"], "low": gap["low"], "high": gap["high"]}
            for name, gap in self.differences.items()
        ]
        return as_kind(pa.Table.from_pylist(rows), self.kind)

    def __repr__(self) -> str:
        lists = f"The first {LIST_LENGTH} items differ for {self.changed:.0%} of the queries; {self.overlap:.0%} of them are equal."
        return f"{self.verdict} {lists}"

    def _repr_html_(self) -> str:
        return f"<b>{escape(repr(self))}</b>"


def compare(a: Model, b: Model) -> Comparison:
    """Compare two models on the test part of their data.

    Parameters
    ----------
    a, b
        Models with their runs: just fitted, or `load` of the folder of a fit. Both must have the same prepared data.

    Returns
    -------
    Comparison
        Intervals of a minus b, from a bootstrap over users that both models share, and the lists that changed.

    Raises
    ------
    DataError
        A model has no run, the data differ, or there is no test part.
    """
    for name, one in ((FIRST, a), (SECOND, b)):
        if not hasattr(one, "folder") or not hasattr(one, "fit"):
            raise DataError(f"{name} is a {type(one).__name__}. Compare two models: compare(model, other).")
    if a.folder is None or b.folder is None:
        raise DataError(
            "A saved model has no test queries. Compare models that were just fitted, or load(folder) of fit(folder=...)."
        )
    runs = [folder / "model" if (folder / "model").is_dir() else folder for folder in (a.folder, b.folder)]
    datasets = [run_dataset(run) for run in runs]
    if datasets[0].fingerprint != datasets[1].fingerprint:
        raise DataError(
            "The models have different prepared data. Fit both on the same frames, with equal data and prepare settings."
        )
    dataset, systems = datasets[0], []
    for name, run in zip((FIRST, SECOND), runs, strict=True):
        model, config, _ = load_trained(run / "best.pt", dataset)
        store = open_store(dataset, "test", config.model)
        moment = split_moment(dataset, "test")
        systems.append(NeuralRetriever(model, store, n_item_rows=dataset.n_item_rows, time_s=moment, name=name))
        if name == FIRST:
            settings, metric, seed = config.evaluation, config.training.eval_metric, config.seed
    held_out = dataset.held_out("test", max_queries=settings.max_queries, seed=seed).by_time()
    alone = settings.model_copy(update={"baselines": []})
    result = judge(systems, dataset, alone, held_out=held_out, main=FIRST, metric=metric, seed=seed)
    values = {name: {one: result.systems[one][name].value for one in (FIRST, SECOND)} for name in result.systems[FIRST]}
    overlap, lists = _lists(systems, dataset, held_out, exclude_seen=settings.exclude_seen)
    kind = a._made.kind
    return Comparison(
        metric,
        values,
        {name: gap.model_dump() for name, gap in result.differences[SECOND].items()},
        float(overlap.mean()),
        float((overlap < 1).mean()),
        as_kind(lists, kind),
        kind,
    )


def _lists(
    systems: list[NeuralRetriever], dataset: Dataset, held_out: HeldOut, *, exclude_seen: bool
) -> tuple[np.ndarray, pa.Table]:
    """Return the overlap of both lists by query [B], and the lists that changed most."""
    queries = held_out.queries.slice(0, LISTS)
    one, other = (system.retrieve(queries, LIST_LENGTH, exclude_seen=exclude_seen).items for system in systems)
    equal = np.array([len(np.intersect1d(x[x >= 0], y[y >= 0])) / max((x >= 0).sum(), 1) for x, y in zip(one, other, strict=True)])
    order = np.argsort(equal, kind="stable")
    _, first = np.unique(queries.user_row[order], return_index=True)  # one list of each user
    most = order[np.sort(first)][:CHANGED_LISTS]
    kinds = id_types(dataset.manifest)
    users = dataset.users[USER_ID].take(np.repeat(queries.user_row[most] - FIRST_ROW, LIST_LENGTH))
    columns = {
        "user": frame_ids(users, kinds[USER_ID]),
        "rank": pa.array(np.tile(np.arange(1, LIST_LENGTH + 1), len(most)), pa.int32()),
        FIRST: _items(dataset, one[most], kinds),
        SECOND: _items(dataset, other[most], kinds),
    }
    return equal, pa.table(columns)


def _items(dataset: Dataset, rows: Int, kinds: Mapping[str, str]) -> Any:
    found = rows.reshape(-1)
    positions = pa.array(found - FIRST_ROW, mask=found < FIRST_ROW)
    return frame_ids(dataset.items[ITEM_ID].take(positions), kinds[ITEM_ID])

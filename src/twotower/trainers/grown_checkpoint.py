"""Grow a checkpoint: its tables get rows for the items, users and values that an extended dataset has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from twotower.data.dataset import Dataset
from twotower.data.train_events import Replay
from twotower.errors import TrainingError
from twotower.models.build import build_model
from twotower.models.layers.tables import RowTable, Table
from twotower.models.two_tower import TwoTower
from twotower.schema import UNKNOWN
from twotower.trainers.optimizer import make_optimizer
from twotower.utils.checkpoint import load_checkpoint, save_checkpoint
from twotower.utils.config import EmbeddingConfig, ResolvedConfig, parse_config


@dataclass(frozen=True, slots=True)
class Start:
    """The state from which an update starts.

    Attributes
    ----------
    checkpoint
        File that `grow_checkpoint` wrote.
    replay
        The events to train on.
    """

    checkpoint: Path
    replay: Replay


def grow_checkpoint(checkpoint: Path, base: Dataset, grown: Dataset, out: Path, config: ResolvedConfig) -> ResolvedConfig:
    """Write a checkpoint whose tables have the rows of an extended dataset; return its settings.

    Known rows keep weights and optimiser state to the bit. A new row of a table begins as the row UNKNOWN, so that a new item or
    user is first what its features say, as before the update; its optimiser state begins at zero.

    Parameters
    ----------
    base, grown
        The dataset of the checkpoint, and the one that extends it.
    config
        Settings of the update; the tables keep the storage that they have.

    Raises
    ------
    TrainingError
        A hashed table would have other rows, or a table outgrows `max_rows`.
    """
    state = load_checkpoint(checkpoint)
    if state["data"] != base.fingerprint:
        raise TrainingError(
            f"{checkpoint} was trained on other data than {base.path}. Nothing was changed. Train the run again, or repeat "
            "`twotower forget` if it was interrupted."
        )
    old = build_model(base, parse_config(state["config"], ResolvedConfig))
    new = build_model(grown, config)
    pairs = [(name, before, after) for (name, before), (_, after) in zip(_tables(old), _tables(new), strict=True)]
    moved = {name: _as_stored(config, name, before) for name, before, after in pairs if type(before) is not type(after)}
    if moved:  # a table that has grown over `sparse_update_from_rows`
        tables = config.model.tables | moved
        config = config.model_copy(update={"model": config.model.model_copy(update={"tables": tables})})
        new = build_model(grown, config)
    for (name, before), (_, after) in zip(_tables(old), _tables(new), strict=True):
        _check_hashing(name, before, after)
    shapes = {name: value.shape for name, value in new.state_dict().items()}
    for name, value in state["model"].items():
        state["model"][name] = _grown(value, shapes[name], fill=value[_unknown(name)] if value.shape != shapes[name] else None)
    for name, rows in state["rows"].items():
        rows["moments"] = _grown(rows["moments"], torch.Size((len(state["model"][f"{name}.weight"]), 2)))
    groups = make_optimizer(new, 1.0, 0.0).param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    for number, moments in state["optimizer"]["state"].items():
        for key, value in moments.items():
            if isinstance(value, Tensor) and value.ndim:
                moments[key] = _grown(value, parameters[number].shape)
    save_checkpoint(out, {**state, "data": grown.fingerprint, "config": config.model_dump(mode="json")})
    return config


def _tables(model: TwoTower) -> Iterator[tuple[str, Table]]:
    for name, table in model.tables.items():
        assert isinstance(table, Table)
        yield name.replace("/", "."), table


def _as_stored(config: ResolvedConfig, name: str, table: Table) -> EmbeddingConfig:
    """Return the settings of a table, with the update rule that it has: its optimiser state fits no other one."""
    rule = "sparse" if isinstance(table, RowTable) else "dense"
    return config.model.stored(name, table.ids).model_copy(update={"update": rule})


def _check_hashing(name: str, before: Table, after: Table) -> None:
    same = (before.hashing is None) == (after.hashing is None)
    if before.hashing is not None and after.hashing is not None:
        same = before.hashing.kind == "double" or before.ids == after.ids
    if not same:
        raise TrainingError(
            f"The table {name} grows from {before.ids:,} to {after.ids:,} ids, and its hashing (model.tables.{name}) would map the "
            "known ones to other rows. Nothing was changed. Train again with all data."
        )


def _unknown(name: str) -> int:
    """Return the row that new rows of a parameter begin as: UNKNOWN in tables, code 0 (another type) of event types."""
    return UNKNOWN if name.startswith("tables.") else 0


def _grown(value: Tensor, shape: torch.Size, fill: Tensor | None = None) -> Tensor:
    """Return a tensor with more rows: zeros, or `fill`."""
    if value.shape == shape:
        return value
    assert value.shape[1:] == shape[1:] and len(value) < shape[0], (value.shape, shape)
    more = value.new_zeros(shape[0] - len(value), *shape[1:])
    return torch.cat([value, more if fill is None else more + fill])

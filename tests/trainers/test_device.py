"""Test that a step works on any device: it mixes no devices, and reads no values before a log line needs them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils

from twotower.data.data_loader import DeviceCopies, TrainLoader
from twotower.data.dataset import Dataset
from twotower.features.batches import ALIGNED, map_tensors, packed, unpacked
from twotower.models.layers.tables import distinct_rows, padded_distinct_rows
from twotower.models.neural_retriever import item_blocks
from twotower.retriever import Queries
from twotower.schema import FIRST_ROW
from twotower.search import topk
from twotower.trainers import base_trainer
from twotower.trainers.two_tower_trainer import TwoTowerTrainer
from twotower.utils.config import Config, parse_config

from .conftest import settings

META = torch.device("meta")
CLASSIC = {"embedding_dim": 16, "hidden_dims": [32, 16]}  # with an MLP, and so a cross network
BY_ROWS = {"update": "sparse", "weight_decay": 0.01}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "next event": {"training": {"objective": "next_event"}},
    "micro-batches": {"training": {"micro_batch_size": 60}},
    "recomputed attention": {"training": {"gradient_checkpointing": True}},
    "full softmax": {"training": {"loss": "full_softmax"}},
    "fp16": {"training": {"precision": "fp16"}},
    "classic towers": {"model": {"user_tower": CLASSIC, "item_tower": CLASSIC}},
    "tables by rows": {"model": {"tables": {"item.id": BY_ROWS, "user.id": {**BY_ROWS, "max_rows": 64}}}},
    "tables by rows in bf16": {"model": {"tables": {"item.id": {**BY_ROWS, "dtype": "bf16"}}}},
    "request place": {"model": {"request_location": True}},
}


def settings_of(kind: str) -> Config:
    values = settings().model_dump(mode="json")
    for section, chosen in KINDS[kind].items():
        values[section] |= chosen
    return parse_config(values)


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run trainers on PyTorch's `meta` device, which has shapes but no values, so reading a value is an error.

    Autocast does not know that device; the fused optimiser supports it but does not list it.
    """
    devices = _foreach_utils._get_fused_kernels_supported_devices
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: [*devices(), "meta"])
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(base_trainer, "choose_device", lambda _: META)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("on_meta")
def test_a_step_runs_on_the_meta_device(dataset: Dataset, tmp_path: Any, kind: str) -> None:
    trainer = TwoTowerTrainer(dataset, settings_of(kind), tmp_path)
    trainer.settings = trainer.settings.model_copy(update={"log_every": 1000})
    assert all(weight.device == META for weight in trainer.model.parameters())
    for batch in list(trainer.batches(0, 0))[:2]:
        trainer._step(batch)
    assert trainer.state.step == 2
    with pytest.raises(NotImplementedError):  # the first line of the log would read
        trainer.check()


@pytest.mark.parametrize("kind", ["plain", "next event", "tables by rows"])
@pytest.mark.usefixtures("on_meta")
def test_encoding_scoring_and_the_best_run_on_the_meta_device(dataset: Dataset, tmp_path: Any, kind: str) -> None:
    trainer = TwoTowerTrainer(dataset, settings_of(kind), tmp_path)
    model, store = trainer.model.eval(), trainer.store
    rows = np.arange(dataset.n_item_rows)
    with torch.no_grad():
        items = torch.cat([model.encode_items(block) for block in item_blocks(model, store, rows, 0)])
        queries: Queries = trainer.held_out.queries
        users = model.encode_users(store.users(queries).to(META))
    best, found, broken = topk._best(users @ items.T, 10)
    assert best.shape == found.shape == (len(queries), 10) and broken.shape == ()
    assert best.device == found.device == broken.device == META


READS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__", "__array__", "nonzero")


class Reads(TorchFunctionMode):
    """Records every operation that copies a value from the device to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_what_reads_a_value_is_noted() -> None:
    x = torch.ones(1)
    for read in (float, int, bool, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, np.asarray):
        with Reads() as reads:
            read(x)  # type: ignore[operator]
        assert reads.found, read


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_nothing_back_but_for_the_log(dataset: Dataset, tmp_path: Any, kind: str) -> None:
    """At most one read per `log_every` steps, also on a CPU, where fp16 works and values can be read."""
    trainer = TwoTowerTrainer(dataset, settings_of(kind), tmp_path)
    trainer.settings = trainer.settings.model_copy(update={"log_every": 4})
    batches = [trainer.loader.batch(members, 0, step) for step, members in enumerate(trainer.loader.plan(0)[:8])]
    while len(batches) < 8:
        batches.append(batches[0])
    counted = []
    for batch in batches:
        with Reads() as reads:
            trainer._step(batch)
        counted.append(reads.found)
    assert counted == [[], [], [], ["tolist"]] * 2


def test_the_loop_reads_back_for_the_log_alone(dataset: Dataset, tmp_path: Any) -> None:
    """All of `fit` between two validations: twelve steps, three lines of the log."""
    config = settings(log_every=4, eval_every_epochs=1000.0, max_steps=1000)
    trainer = TwoTowerTrainer(dataset, config, tmp_path)
    step, counted = trainer._step, []

    def counting(batch: Any) -> None:
        step(batch)
        counted.append(len(reads.found))
        if trainer.state.step == 14:
            raise KeyboardInterrupt

    trainer._step = counting  # type: ignore[method-assign]
    with Reads() as reads, pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert counted[13] - counted[1] == 3, "of steps 3 to 14"


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_distinct_rows_of_a_known_length_are_those_of_unique(size: int) -> None:
    row = torch.randint(0, size // 2 + 1, (size,), generator=torch.Generator().manual_seed(size))
    distinct, at = distinct_rows(row)
    padded, found = padded_distinct_rows(row)
    assert torch.equal(padded[: len(distinct)], distinct) and not padded[len(distinct) :].any()
    assert torch.equal(at, found) and torch.equal(padded[found], row)


def test_tables_by_rows_learn_the_same_from_rows_of_a_known_length(
    dataset: Dataset, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU code path on a CPU gives the same bits, up to the order of additions."""
    losses = []
    for distinct in (distinct_rows, padded_distinct_rows):
        monkeypatch.setattr("twotower.models.layers.tables.distinct_rows", distinct)
        trainer = TwoTowerTrainer(dataset, settings_of("tables by rows"), tmp_path)
        for batch in list(trainer.batches(0, 0)):
            trainer._step(batch)
        losses.append((trainer.losses.mean(), trainer.tables["tables.item/id"].weight.clone()))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    torch.testing.assert_close(losses[0][1], losses[1][1], rtol=1e-4, atol=1e-6)


def test_keys_order_as_the_full_sort_does() -> None:
    """The GPU code path on a CPU, with few distinct scores, so that most are tied."""
    scores = torch.randint(-3, 3, (50, 200), generator=torch.Generator().manual_seed(1)).float() / 4
    scores[:, ::7] = float("-inf")
    found = torch.topk(topk._keys(scores), 20, dim=1).indices
    assert torch.equal(found, torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :20])


# Batches.


class Slow(DeviceCopies):
    """Simulate asynchronous copies: the result of `start` may be read only after `finish`."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.threads: set[str] = set()

    def start(self, batch: Any) -> Any:
        self.threads.add(threading.current_thread().name)
        return map_tensors(batch, lambda tensor: tensor.new_zeros(tensor.shape)), batch

    def finish(self, batch: Any, copied: Any) -> Any:  # noqa: ARG002 - the signature of what it replaces
        assert threading.current_thread() is threading.main_thread()
        return copied


@pytest.fixture
def loader(dataset: Dataset, tmp_path: Any) -> TrainLoader:
    return TwoTowerTrainer(dataset, settings(micro_batch_size=60), tmp_path).loader


def tensors(batch: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, keep)
    return found


@pytest.mark.parametrize("copies", [DeviceCopies, None])
def test_copied_ahead_batches_keep_their_order_and_their_content(
    loader: TrainLoader, monkeypatch: pytest.MonkeyPatch, copies: Callable[..., Any] | None
) -> None:
    slow = Slow()
    if copies is None:
        monkeypatch.setattr("twotower.data.data_loader.DeviceCopies", lambda _: slow)
    made = [loader.batch(members, 0, step) for step, members in enumerate(loader.plan(0))]
    found: Iterator[Any] = loader.iterate(0, device="cpu")
    for one, other in zip(made, found, strict=True):
        pairs = list(zip(tensors(one), tensors(other), strict=True))
        assert len(pairs) > 20 and all(torch.equal(a, b) for a, b in pairs)
        assert one.shares == other.shares and one.examples == other.examples
    assert slow.threads == ({"twotower-loader"} if copies is None else set())


def test_a_batch_packed_into_one_block_is_the_same_batch(loader: TrainLoader) -> None:
    batch = loader.batch(loader.plan(0)[0], 0, 0)
    block, slots = packed(batch)
    block = block.clone()  # as if it had come from elsewhere
    found = unpacked(block, slots)
    for one, other in zip(tensors(batch), tensors(found), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(one, other)
        assert not other.numel() or block.data_ptr() <= other.data_ptr() < block.data_ptr() + len(block)
        assert (other.data_ptr() - block.data_ptr()) % ALIGNED == 0 or not other.numel()
    assert found.shares == batch.shares and found.masked.offsets is batch.masked.offsets


def test_all_tensors_of_a_batch_move(loader: TrainLoader) -> None:
    moved = loader.batch(loader.plan(0)[0], 0, 0).to("meta")
    assert {tensor.device for tensor in tensors(moved)} == {META}
    assert isinstance(moved.masked.offsets, np.ndarray), "in host memory: read without waiting for the device"
    assert int(moved.masked.offsets[-1]) == len(moved.masked.example)
    assert all(len(part.items.row) >= FIRST_ROW for part in moved.users)

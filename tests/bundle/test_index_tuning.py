"""Test that an index is measured, chosen and written into a bundle, and that the bundle then uses it."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from twotower.bundle import index_tuning
from twotower.bundle.bundle import INDEX, load_bundle
from twotower.bundle.index_tuning import Measured, choose
from twotower.bundle.revision import add_items
from twotower.cli import main
from twotower.errors import DataError
from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import HistoryEvent, Request
from twotower.search.approximate import LEAST_FACTOR, one_thread


@pytest.fixture
def bundle(town_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the bundle, and allow every index kind at any size."""
    monkeypatch.setattr(index_tuning, "MIN_ITEMS", {"ivf_pq": 256})
    monkeypatch.setattr(index_tuning, "USERS", 40)
    monkeypatch.setattr(index_tuning, "TIMED", 5)
    shutil.copytree(town_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("kind", ["exact", "int8", "sq", "hnsw"])
def test_a_tuned_bundle_answers_like_the_exact_one(
    kind: str, bundle: Path, recommender: Recommender, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = bundle.parent / "made" / "plot.svg"
    assert main(["tune-index", str(bundle), "--kinds", kind, "--k", "10", "--recall", "0.9", "--plot", str(plot)]) == 0
    assert kind in capsys.readouterr().out
    drawn = ElementTree.parse(plot).getroot()
    assert drawn.findall(".//{*}circle[@class='chosen']")
    opened = load_bundle(bundle)
    assert opened.index.kind == kind
    told = opened.manifest.index
    assert told.kind == kind and told.recall >= 0.9 and told.p50_ms > 0 and told.bytes > 0 and told.k == 10
    history = tuple(HistoryEvent(str(name)) for name in recommender.dataset.item_ids[2:6])
    for request in (
        Request(history=history, k=10),
        Request(history=history, k=10, popularity_bias=1.0, filter="seen or price <= 2", exclude_seen=False),
        Request(history=history, k=10, filter={"seen": True}),
    ):
        (ours,), (exact,) = Recommender(opened).answer([request]), recommender.answer([request])
        assert len(ours.items) == len(exact.items)
        same = {place.item_id for place in ours.items} & {place.item_id for place in exact.items}
        assert len(same) >= 0.8 * len(exact.items)


def test_a_filter_knows_what_was_seen_and_what_is_open(recommender: Recommender) -> None:
    ids = [str(name) for name in recommender.dataset.item_ids[2:6]]
    history = tuple(map(HistoryEvent, ids))
    (answer,) = recommender.answer([Request(history=history, k=20, filter="seen", exclude_seen=False)])
    assert {place.item_id for place in answer.items} == set(ids)
    assert recommender.answer([Request(history=history, k=20, filter="open_now")])[0].items


def test_an_index_is_built_again_when_items_come(bundle: Path) -> None:
    assert main(["tune-index", str(bundle), "--kinds", "hnsw", "--k", "10", "--recall", "0.5"]) == 0
    new = bundle.parent / "new.jsonl"
    new.write_text(json.dumps({"item_id": "brand-new", "name": "New", "city": "Here"}) + "\n")
    before = load_bundle(bundle)
    add_items(bundle, new)
    opened = load_bundle(bundle)
    assert opened.index.kind == "hnsw" and opened.index.settings == before.index.settings
    vectors = opened.arrays.vectors
    like_it = vectors[-1:].copy()
    like_it[:, opened.vectors.shape[1] :] = 0  # popularity and location have no part in likeness
    found = opened.index.search(like_it, 3).items[0]
    assert len(vectors) == len(before.arrays.vectors) + 1 and len(vectors) - 1 in found


def test_a_changed_index_is_refused(bundle: Path) -> None:
    assert main(["tune-index", str(bundle), "--kinds", "hnsw", "--k", "10", "--recall", "0.5"]) == 0
    file = bundle / INDEX / "index.faiss"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="is damaged"):
        load_bundle(bundle)


def test_the_cheapest_that_is_good_enough() -> None:
    rows = [
        Measured("exact", {}, 1.0, 5.0, 100),
        Measured("a", {}, 0.98, 0.1, 1),
        Measured("b", {}, 0.995, 1.0, 90),
        Measured("c", {}, 0.991, 1.05, 20),
        Measured("d", {}, 0.999, 1.2, 10),
    ]
    assert choose(rows, 0.99) is rows[3], "among the about equally fast the smallest"
    assert choose(rows, 1.0) is rows[0]
    assert choose(rows[1:], 1.0) is None


def test_what_cannot_be_tuned_is_one_line(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (bundle / "manifest.json").read_bytes()
    for folder, words in (
        (bundle, ["--kinds", "hnws"]),
        (bundle, ["--recall", "0"]),
        (bundle, ["--k", "0"]),
        (bundle, ["--kinds", "ivf_pq"]),  # the town is too small for it
        (tmp_path / "nothing", []),
    ):
        assert main(["tune-index", str(folder), *words]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert (bundle / "manifest.json").read_bytes() == before


def test_threads_are_as_before() -> None:
    import torch

    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
        np.ones((8, 8)) @ np.ones((8, 8))
    assert torch.get_num_threads() == before


def test_weights_of_zero_have_the_least_factor_that_an_index_takes() -> None:
    """In float32, the least factor would be rounded below itself."""
    factors = index_tuning.balance_of(np.zeros((3, 6), np.float32), 4)
    assert all(type(factor) is float and factor >= LEAST_FACTOR for factor in factors)

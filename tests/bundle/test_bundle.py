"""Test an opened bundle: a `Retriever` that returns the results of its model, and can be evaluated with baselines."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from twotower.baselines.baselines import BASELINES
from twotower.bundle.bundle import INDEX_FILE, Bundle, load_bundle, note_report
from twotower.data.dataset import Dataset
from twotower.evaluation.evaluator import evaluate, judge
from twotower.models.neural_retriever import PORTION, NeuralRetriever
from twotower.retriever import Queries, Retriever
from twotower.schema import FIRST_ROW
from twotower.utils.config import EvaluationConfig

from ..documents import empty_report


@pytest.fixture(scope="module")
def bundle(town_bundle: Path) -> Bundle:
    return load_bundle(town_bundle)


@pytest.fixture(scope="module")
def queries(bundle: Bundle) -> Queries:
    """More than are encoded at once; some without a history, some of users that are known."""
    draw = np.random.default_rng(5)
    histories = [draw.integers(FIRST_ROW, bundle.dataset.n_item_rows, n % 25).tolist() for n in range(PORTION + 60)]
    known = [1 + n % 200 for n in range(len(histories))]
    return Queries.of(histories, time_s=bundle.moment_s, user_rows=known)


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("masks", ["none", "one for all", "one each"])
@pytest.mark.parametrize("onnx", [True, False])
def test_it_answers_as_the_model_of_the_same_moment(
    bundle: Bundle, queries: Queries, exclude_seen: bool, masks: str, onnx: bool
) -> None:
    draw, n = np.random.default_rng(6), bundle.dataset.n_item_rows
    allow = {"none": None, "one for all": draw.random(n) < 0.5, "one each": draw.random((len(queries), n)) < 0.5}[masks]
    asked: Retriever = bundle if onnx else replace(bundle, tower=None)
    model: Retriever = NeuralRetriever(bundle.model, bundle.store, n_item_rows=n, time_s=bundle.moment_s)
    assert asked.name == model.name
    offered = bundle.arrays.offered if allow is None else allow & bundle.arrays.offered  # not closed businesses
    found = asked.retrieve(queries, 10, exclude_seen=exclude_seen, allow=allow)
    wanted = model.retrieve(queries, 10, exclude_seen=exclude_seen, allow=offered)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=2e-5)
    same = found.items == wanted.items
    assert same.mean() > 0.999  # vectors agree to rounding: only items of equal scores may change places
    assert (np.abs(found.scores - wanted.scores)[~same] < 2e-5).all()
    assert bundle.retrieve(queries.slice(0, 0), 10).items.shape == (0, 10)


def test_items_taken_out_of_the_catalogue_are_not_recommended(bundle: Bundle, queries: Queries) -> None:
    best = bundle.retrieve(queries, 3).items
    offered = bundle.arrays.offered.copy()
    offered[best[:, 0]] = False
    smaller = replace(bundle, arrays=replace(bundle.arrays, offered=offered))
    for allow in (None, np.ones(bundle.dataset.n_item_rows, np.bool_)):
        found = smaller.retrieve(queries, 3, allow=allow).items
        assert (found >= FIRST_ROW).any() and not np.isin(found, best[:, 0]).any()


def test_vectors_are_read_from_the_file_and_never_written_to_it(town_bundle: Path) -> None:
    before, bundle = (town_bundle / INDEX_FILE).read_bytes(), load_bundle(town_bundle)
    assert not bundle.arrays.vectors.flags.owndata and not bundle.arrays.tokens.flags.owndata
    bundle.arrays.vectors[FIRST_ROW] = 7
    assert (town_bundle / INDEX_FILE).read_bytes() == before
    assert (load_bundle(town_bundle).arrays.vectors[FIRST_ROW] != 7).any()


def test_it_is_judged_beside_baselines(bundle: Bundle, dataset: Dataset) -> None:
    held_out = dataset.held_out("test", max_queries=100, seed=0)
    settings = EvaluationConfig(baselines=["popular"], bootstrap_resamples=10, ks=[10])
    report = judge([bundle], dataset, settings, held_out=held_out, metric="NDCG@10", seed=0)
    alone = evaluate(bundle, held_out, dataset, settings).mean("NDCG@10")
    assert report.systems[bundle.name]["NDCG@10"].value == pytest.approx(alone, abs=1e-6) and alone > 0
    popular = evaluate(BASELINES["popular"](dataset), held_out, dataset, settings).mean("NDCG@10")
    assert report.systems["popular"]["NDCG@10"].value == pytest.approx(popular, abs=1e-6)


def test_where_folders_cannot_be_exchanged_a_loader_waits(
    town_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(town_bundle, tmp_path / "bundle")
    monkeypatch.setattr("twotower.utils.atomic_files._exchange", lambda *_: False)
    note_report(tmp_path / "bundle", empty_report("good"))
    assert load_bundle(tmp_path / "bundle").manifest.report == empty_report("good").summary()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    (tmp_path / "bundle").rename(tmp_path / "away")
    threading.Timer(0.02, lambda: (tmp_path / "away").rename(tmp_path / "bundle")).start()
    assert load_bundle(tmp_path / "bundle").manifest.report == empty_report("good").summary()

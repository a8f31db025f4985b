"""Test answers: alone and in batches, for known and unknown users, with all options, and for invalid requests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from twotower.bundle.bundle import Bundle, export_bundle
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import log_popularity
from twotower.data.prepare import prepare
from twotower.errors import RequestError
from twotower.features.geo import distances_km, median_location
from twotower.models.history_terms import recent_sum
from twotower.models.neural_retriever import NeuralRetriever
from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import Answer, HistoryEvent, Request
from twotower.retrieval.request_reader import WEEK_S, Ids, Reader
from twotower.schema import UNKNOWN
from twotower.search.reranking import POPULARITY_SCALE, mmr
from twotower.utils.checkpoint import save_checkpoint
from twotower.utils.config import parse_config

from ..drawn_bundle import checkpoint_of, drawn


def ids(answer: Answer) -> list[str]:
    return [place.item_id for place in answer.items]


@pytest.fixture(scope="module")
def known(recommender: Recommender) -> str:
    """Return a user with the longest history."""
    return str(recommender.dataset.user_ids[np.argmax(np.diff(recommender.dataset.events.offsets))])


@pytest.fixture(scope="module")
def some(recommender: Recommender) -> list[str]:
    return [str(name) for name in recommender.dataset.item_ids[[5, 9, 40, 77]]]


def test_three_lines_of_python(town_bundle: Any, some: list[str]) -> None:
    recommender = Recommender.load(town_bundle)
    places = recommender.recommend(history=some, k=3)
    assert [place.rank for place in places] == [1, 2, 3] and not {place.item_id for place in places} & set(some)


def scoreless(answer: Answer) -> Answer:
    return replace(answer, stages_ms={}, items=[replace(place, score=0.0) for place in answer.items])


def test_many_at_once_are_answered_as_each_alone(recommender: Recommender, known: str, some: list[str]) -> None:
    requests = [
        Request(user=known),
        Request(history=tuple(map(HistoryEvent, some)), k=20, diversity=0.4),
        Request(),
        Request(near=(27.9, -82.4), k=3),
        Request(user="nobody", history=(HistoryEvent(some[0], stars=2.0),), filter='category == "Restaurants"', k=400),
        Request(user=known, history=tuple(map(HistoryEvent, some)), popularity_bias=-1.0, exclude_seen=False),
        Request(user="nobody", filter="price <= 2", k=7),
    ]
    together = recommender.answer(requests)
    for request, found in zip(requests, together, strict=True):
        (alone,) = recommender.answer([request])
        assert scoreless(found) == scoreless(alone)
        # A product of several vectors adds up in another order than one of a single vector; four places are shown.
        assert [place.score for place in found.items] == pytest.approx([place.score for place in alone.items], abs=1.1e-4)
    assert [one.source for one in together] == ["model", "model", "recent", "nearby", "model", "model", "recent"]
    assert [one.user_known for one in together] == [True, False, False, False, False, True, False]
    assert {"features", "tower", "filter", "search", "describe"} <= together[0].stages_ms.keys()


def test_a_bad_request_spoils_no_other(recommender: Recommender, some: list[str]) -> None:
    bad = Request(history=(HistoryEvent("nothing"),))
    first, second, third = recommender.answer_each([Request(history=(HistoryEvent(some[0]),)), bad, Request(filter="(")])
    assert isinstance(first, Answer) and first.items
    assert isinstance(second, RequestError) and "'nothing'" in str(second)
    assert isinstance(third, RequestError)
    with pytest.raises(RequestError, match="'nothing'"):
        recommender.answer([Request(), bad])
    assert recommender.answer([]) == []


@pytest.mark.parametrize(
    "part",
    [
        {"k": 0},
        {"k": -3},
        {"diversity": 1.5},
        {"diversity": float("nan")},
        {"popularity_bias": -1.1},
        {"near": (100.0, 0.0)},
        {"time_s": -1},
        {"time_s": 10**30},
        {"filter": "price <"},
        {"history": (HistoryEvent("x"),)},
        {"history": ("stars", 9.0)},
        {"history": ("event_type", "dance")},
        {"history": ("time_s", 2**63)},
    ],
)
def test_an_invalid_request_is_one_line(recommender: Recommender, some: list[str], part: dict[str, Any]) -> None:
    if part.get("history") and isinstance(part["history"][0], str):
        name, value = part["history"]
        part = {"history": (HistoryEvent(some[0], **{name: value}),)}
    with pytest.raises(RequestError) as caught:
        recommender.answer([Request(**part)])
    assert "\n" not in str(caught.value)


def test_visits_go_on_from_the_bundles_own_history(recommender: Recommender, known: str, some: list[str]) -> None:
    reader, moment = recommender.reader, recommender.moment_s
    own = reader.read(Request(user=known)).history
    more = reader.read(
        Request(user=known, history=(HistoryEvent(some[0], time_s=moment + 50, stars=4.0), HistoryEvent(some[1])))
    ).history
    assert more.item_row.tolist() == [*own.item_row, *recommender.dataset.item_rows([some[0], some[1]])], "in the order given"
    assert more.time_s.tolist() == [moment + 51] and more.stars[-2] == 4
    earlier = reader.read(
        Request(user=known, time_s=int(own.event_time_s[3]), history=(HistoryEvent(some[0], time_s=moment),))
    ).history
    assert (earlier.event_time_s < own.event_time_s[3]).all() and len(earlier.item_row) <= 3
    (times,) = (reader.read(Request(history=tuple(map(HistoryEvent, some)))).history.event_time_s,)
    assert (moment - times).tolist() == [4 * WEEK_S, 3 * WEEK_S, 2 * WEEK_S, WEEK_S]


def test_the_back_off_is_what_was_visited_lately(recommender: Recommender) -> None:
    arrays, dataset = recommender.bundle.arrays, recommender.dataset
    visits = dataset.item_events
    late = visits.time_s >= recommender.moment_s - 90 * 86_400
    assert (arrays.recent_event_count == np.bincount(visits.item_row[late], minlength=dataset.n_item_rows)).all()
    answer = recommender.answer([Request(user="nobody", k=5)])[0]
    order = np.argsort(-arrays.recent_event_count, kind="stable")[:5]
    assert ids(answer) == list(dataset.item_ids[order])
    assert answer.confidence == 0 and answer.items[0].score == 1.0
    place = recommender.filter.locations[30]
    nearby = recommender.answer([Request(near=tuple(place.tolist()), k=20)])[0]
    far = recommender.answer([Request(k=20)])[0]
    km = recommender.answer([Request(near=tuple(place.tolist()), k=198, exclude_seen=False)])[0].items
    assert nearby.source == "nearby" and set(ids(nearby)) != set(ids(far))
    assert np.mean([one.distance_km for one in nearby.items]) < np.mean([one.distance_km for one in km])


def test_confidence_grows_with_the_history(recommender: Recommender, some: list[str]) -> None:
    found = [recommender.answer([Request(history=tuple(map(HistoryEvent, some[:n])))])[0].confidence for n in (1, 3)]
    assert found == [0.25, 0.5]


def test_popularity_is_one_more_dimension(recommender: Recommender, some: list[str]) -> None:
    history = tuple(map(HistoryEvent, some))
    whole = recommender.dataset.n_item_rows
    vectors, width = recommender.bundle.arrays.vectors, recommender.bundle.vectors.shape[1]
    model, often, rarely = (
        recommender.answer([Request(history=history, k=whole, popularity_bias=bias)])[0].items for bias in (0.0, 1.0, -1.0)
    )
    score = {place.item_id: place.score for place in model}
    assert [place.score for place in model] == sorted(score.values(), reverse=True)
    for places, sign in ((often, 1), (rarely, -1)):
        assert {place.item_id: place.score for place in places} == pytest.approx(score, abs=2e-4)
        rows = recommender.dataset.item_rows([place.item_id for place in places])
        total = np.array([place.score for place in places]) + sign * POPULARITY_SCALE * vectors[rows, width]
        assert (np.diff(total) < 2e-4).all()


def test_a_score_is_a_cosine_and_what_is_known_of_the_item(recommender: Recommender, some: list[str]) -> None:
    """Towers, popularities at each half-life and distance, by hand, with the weights of the history's length."""
    history, bundle = tuple(map(HistoryEvent, some)), recommender.bundle
    answer = recommender.answer([Request(history=history, k=50, explain=True)])[0]
    asked = recommender.reader.read(Request(history=history)).history
    (user,) = bundle.encode(asked)
    rows, priors = recommender.dataset.item_rows(ids(answer)), bundle.model.priors
    weights = priors.weights[1].numpy()  # one to four events
    assert 1 <= len(asked.item_row) < 5
    logs = log_popularity(recommender.dataset, bundle.moment_s)
    new = np.arange(len(logs)) >= recommender.dataset.n_train_item_rows
    counted = len(priors.half_lives)
    logs[new, :counted] = np.fmax(logs[new, :counted], float(priors.new_popularity))
    popularity = 0.1 * logs[rows] @ weights[1:-1]
    (home,) = median_location(asked.offsets, asked.item_row, bundle.store.location)
    away = distances_km(bundle.store.location[rows], home)
    half = np.where(np.isnan(away), float(priors.unlocated), away.astype(float) ** 2 / 2)
    distance = -0.1 * weights[-1] * half
    recent = 0.1 * float(priors.recency) * (bundle.vectors[torch.from_numpy(rows)] @ recent_sum(asked, bundle.vectors)[0]).numpy()
    assert bundle.store.transitions is not None and priors.transitions.all()
    _, near, features = bundle.store.transitions.near(asked)
    order = np.zeros(len(logs))
    order[near] = 0.1 * features @ priors.transitions.numpy()
    assert np.count_nonzero(order[rows]) > 3
    wanted = weights[0] * (bundle.vectors.numpy()[rows] @ user) + recent + popularity + distance + order[rows]
    assert [place.score for place in answer.items] == pytest.approx(wanted, abs=5e-3)
    for place, known, far, listed in zip(answer.items, popularity, distance, order[rows], strict=True):
        least = min(abs(reason.contribution) for reason in place.reasons)
        for names, share in ((("popularity", "new"), known), (("distance",), far), (("order",), listed)):
            told = [reason.contribution for reason in place.reasons if reason.name in names]
            assert told == pytest.approx([share], abs=5e-3) or (not told and abs(share) <= least + 5e-3)


def test_seen_items_are_ranked_as_in_evaluation_where_they_may_come_again(recommender: Recommender, some: list[str]) -> None:
    bundle = recommender.bundle
    request = Request(history=tuple(map(HistoryEvent, [*some, some[0]])), k=100, exclude_seen=False)
    (answer,) = recommender.answer([request])
    asked = recommender.reader.read(request).history
    offline = NeuralRetriever(bundle.model, bundle.store, n_item_rows=recommender.dataset.n_item_rows, time_s=bundle.moment_s)
    found = offline.retrieve(asked, 100, exclude_seen=False, allow=bundle.arrays.offered)
    assert recommender.dataset.item_rows(ids(answer)).tolist() == found.items[0].tolist()
    assert [place.score for place in answer.items] == pytest.approx(found.scores[0].tolist(), abs=1e-4)
    served = bundle.retrieve(asked, 100, exclude_seen=False)
    assert served.items.tolist() == found.items.tolist()
    everything = recommender.answer([replace(request, k=recommender.dataset.n_items)])[0]
    assert set(some) <= set(ids(everything))
    filtered = recommender.answer([replace(request, k=recommender.dataset.n_items, filter="not seen")])[0]
    assert not set(some) & set(ids(filtered))


def test_diversity_takes_what_is_unlike_the_rest() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1], [0.6, 0.8]], np.float32)
    scores = np.array([0.9, 0.8, 0.5, 0.4], np.float32)
    assert mmr(scores, vectors, 3, 0.0).tolist() == [0, 1, 2]
    assert mmr(scores, vectors, 4, 0.5).tolist() == [0, 2, 1, 3]
    assert mmr(scores, vectors, 4, 0.8).tolist() == [0, 2, 3, 1]
    assert mmr(scores, vectors, 9, 1.0).tolist()[:2] == [0, 2]


def test_a_known_user_needs_no_history_and_may_have_more(recommender: Recommender, known: str, some: list[str]) -> None:
    plain, more = recommender.recommend(user=known), recommender.recommend(user=known, history=[*some, HistoryEvent(some[0])])
    assert plain != more and len(more) == 10
    with pytest.raises(RequestError, match="Unknown user"):
        recommender.recommend(user="nobody")
    with pytest.raises(RequestError, match="Neither user nor history is given"):
        recommender.recommend()


def test_pytorch_and_onnx_give_the_same_lists(recommender: Recommender) -> None:
    """Compare 1000 requests: known users at four times. If two items are swapped, their scores differ only in the last bits."""
    plain = Recommender(replace(recommender.bundle, tower=None))
    assert recommender.bundle.tower is not None and plain.bundle.tower is None
    moments = np.linspace(plain.moment_s - 3e7, plain.moment_s, 4).astype(int)
    requests = [Request(user=str(user), time_s=int(at), k=100) for user in plain.dataset.user_ids[2:] for at in moments][:1000]
    same = 0
    for one, other in zip(recommender.find(requests), plain.find(requests), strict=True):
        assert not isinstance(one, RequestError) and not isinstance(other, RequestError)
        np.testing.assert_allclose(one.scores, other.scores, atol=2e-6)
        score = dict(zip(one.rows.tolist(), one.scores.tolist(), strict=True))
        swapped = one.rows != other.rows
        for row, told in zip(other.rows[swapped].tolist(), other.scores[swapped].tolist(), strict=True):
            assert score.get(row, one.scores[-1]) == pytest.approx(told, abs=2e-6)
        same += not swapped.any()
    assert len(requests) == 1000 and same >= 980


def test_ids_are_found_whatever_they_are(recommender: Recommender) -> None:
    column = recommender.dataset.users["user_id"]
    found = Ids(column)
    assert [found.row(name) for name in column.to_pylist()] == list(range(2, 2 + len(column)))
    assert found.row("") == found.row("nobody") == UNKNOWN


def test_a_sequence_without_a_clock_takes_real_times(recommender: Recommender, known: str, some: list[str]) -> None:
    reader = Reader(recommender.dataset, 7)
    history = reader.read(Request(user=known, history=(HistoryEvent(some[0], time_s=1_700_000_000),))).history
    assert history.item_row[-1] == recommender.dataset.item_rows([some[0]])[0]


def test_stages_are_numbers_of_milliseconds(recommender: Recommender, known: str) -> None:
    (answer,) = recommender.answer([Request(user=known, explain=True)])
    assert all(isinstance(ms, float) and ms >= 0 for ms in answer.stages_ms.values()) and "explain" in answer.stages_ms


def test_the_bundle_says_what_it_is(town_bundle: Any, recommender: Recommender) -> None:
    bundle: Bundle = recommender.bundle
    dataset = Dataset.open(town_bundle / "dataset")
    assert bundle.manifest.features and bundle.manifest.data == dataset.fingerprint
    assert bundle.manifest.metrics.metric == "NDCG@10"
    assert not [path for path in town_bundle.rglob("*") if path.suffix in (".pkl", ".pt", ".pickle")]
    assert isinstance(bundle.vectors, torch.Tensor)


@pytest.mark.parametrize("table", [{"update": "sparse", "dtype": "bf16", "max_rows": 9}, {"max_rows": 9, "hashing": "double"}, {}])
def test_items_without_clock_or_features_are_answered_too(tmp_path: Any, table: dict[str, Any]) -> None:
    """Test a bundle from a table of events only, with compact embedding tables."""
    events = [f"u{u},p{(u * k + k) % 19}" for u in range(12) for k in range(1, 7)]
    (tmp_path / "e.csv").write_text("\n".join(["user_id,item_id", *events]))
    data = {"source": "tables", "path": str(tmp_path), "interactions": {"path": "e.csv"}}
    config = parse_config({"data": data, "prepare": {"split": {"kind": "leave_one_out"}}})
    prepare(config, tmp_path / "dataset")
    dataset = Dataset.open(tmp_path / "dataset")
    tower = {"embedding_dim": 8, "hidden_dims": [8]}
    model, config = drawn(dataset, {"user_tower": tower, "item_tower": tower, "tables": {"item.id": table, "user.id": table}})
    save_checkpoint(tmp_path / "best.pt", checkpoint_of(dataset, model, config))
    export_bundle(tmp_path / "best.pt", dataset, tmp_path / "bundle")
    recommender = Recommender.load(tmp_path / "bundle")
    plain = Recommender(replace(recommender.bundle, tower=None))
    requests = [
        Request(user="u3", k=50),
        Request(history=(HistoryEvent("p3"), HistoryEvent("p5", time_s=1_700_000_000)), k=3),
        Request(near=(1, 2)),
    ]
    found = recommender.answer(requests)
    assert [one.source for one in found] == ["model", "model", "recent"]
    assert [ids(one) for one in found] == [ids(one) for one in plain.answer(requests)]
    assert found[1].items[0].distance_km is None and found[1].items[0].categories == []

"""Test the evaluation: metrics computed by hand, coverage of the intervals, slices, the verdict and the report's schema."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np
import pytest

from twotower.baselines.baselines import BASELINES, GRIDS, Popular
from twotower.data.dataset import Dataset
from twotower.data.held_out import HeldOut
from twotower.errors import ConfigError, DataError
from twotower.evaluation.bootstrap import intervals, resample
from twotower.evaluation.evaluator import evaluate, fit_baseline, judge, metric_names
from twotower.evaluation.slices import categories, first_target, popularity_class, slices
from twotower.evaluation.verdict import verdict
from twotower.retriever import Queries, Recommendations
from twotower.schema import DAY_S, FIRST_ROW, SPLITS
from twotower.utils.config import EvaluationConfig
from twotower.utils.documents import Interval
from twotower.utils.types import Mask

FAST = EvaluationConfig(ks=[5, 10], bootstrap_resamples=50, tune_baselines=False, baselines=["popular", "recent", "item_knn"])


class Cheat:
    """A retriever that knows the targets: ranks one target of every query first, with probability `skill`."""

    settings: ClassVar[dict[str, float]] = {"skill": 0.5}

    def __init__(self, held_out: HeldOut, dataset: Dataset, skill: float = 1.0, name: str = "two-tower") -> None:
        self.name, self.popular = name, Popular(dataset)
        chosen = np.random.default_rng(0).random(len(held_out.queries)) < skill
        moments = zip(held_out.queries.user_row.tolist(), held_out.queries.time_s.tolist(), strict=True)
        self.answers = {key: row for key, row, sure in zip(moments, first_target(held_out).tolist(), chosen, strict=True) if sure}

    def retrieve(self, queries: Queries, k: int, *, exclude_seen: bool = True, allow: Mask | None = None) -> Recommendations:
        found = self.popular.retrieve(queries, k, exclude_seen=exclude_seen, allow=allow)
        for b, key in enumerate(zip(queries.user_row.tolist(), queries.time_s.tolist(), strict=True)):
            if key in self.answers:
                found.items[b] = [self.answers[key], *found.items[b][found.items[b] != self.answers[key]]][:k]
        return found


@pytest.fixture(scope="module")
def held_out(dataset: Dataset) -> HeldOut:
    return dataset.held_out("test")


@pytest.fixture(scope="module")
def report(dataset: Dataset, held_out: HeldOut) -> Any:
    return judge([Cheat(held_out, dataset)], dataset, FAST, held_out=held_out).json_values()


def test_popularity_counted_by_hand(dataset: Dataset, held_out: HeldOut) -> None:
    evaluation = evaluate(Popular(dataset), held_out, dataset, EvaluationConfig(ks=[5], exclude_seen=False))
    judged = {name: evaluation.mean(name) for name in evaluation.metrics}
    top = np.lexsort((np.arange(dataset.n_item_rows), -dataset.item_train_count))
    top = [row for row in top if row >= FIRST_ROW][:5]
    targets = np.split(held_out.target_row, held_out.target_offsets[1:-1])
    assert judged["HitRate@5"] == pytest.approx(np.mean([bool(set(t) & set(top)) for t in targets]))
    assert judged["Recall@5"] == pytest.approx(np.mean([len(set(t) & set(top)) / len(t) for t in targets]))
    assert set(judged) == {f"{m}@5" for m in ("Recall", "HitRate", "NDCG", "MRR", "MAP", "Precision")}


def test_parts_do_not_matter(dataset: Dataset, held_out: HeldOut, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, seen = evaluate(Popular(dataset), held_out, dataset, FAST), []
    monkeypatch.setattr("twotower.evaluation.evaluator.QUERIES_AT_ONCE", 37)
    parts = evaluate(Popular(dataset), held_out, dataset, FAST, progress=lambda done, total: seen.append((done, total)))
    np.testing.assert_array_equal(parts.values, whole.values)
    assert parts.beyond == pytest.approx(whole.beyond)
    size = len(held_out.queries)
    assert seen[-1] == (size, size) and len(seen) == -(-size // 37)


def test_masking_seen_items_is_the_protocols_choice(dataset: Dataset, held_out: HeldOut) -> None:
    repeat = BASELINES["repeat"](dataset)
    masked, allowed = (evaluate(repeat, held_out, dataset, EvaluationConfig(exclude_seen=x)).mean("NDCG@10") for x in (True, False))
    assert masked != allowed


def test_a_perfect_system(report: Any) -> None:
    assert report["systems"]["two-tower"]["MRR@10"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert report["verdict"].startswith("Better than ") and ", the best baseline (+" in report["verdict"]


def test_schema_of_the_report(report: Any, dataset: Dataset, held_out: HeldOut) -> None:
    assert {"dataset", "protocol", "systems", "slices", "verdict", "differences", "beyond", "seconds", "settings"} <= set(report)
    assert report["protocol"]["split"] == "time" and report["protocol"]["seen"] == "masked"
    assert list(report["systems"]) == ["two-tower", "popular", "recent", "item_knn", "oracle"]
    for figures in report["systems"].values():
        assert set(figures) == set(metric_names(FAST))
        assert all(f["low"] <= f["value"] <= f["high"] for f in figures.values())
    assert set(report["differences"]) == {"popular", "recent", "item_knn", "oracle"}
    for name, figures in report["differences"].items():
        for metric, f in figures.items():
            own, other = report["systems"]["two-tower"][metric]["value"], report["systems"][name][metric]["value"]
            assert f["value"] == pytest.approx(own - other, abs=2e-6)
    assert report["settings"]["recent"] == {"days": 30} and report["settings"]["two-tower"] == {"skill": 0.5}
    for groups in report["slices"].values():
        assert sum(entry["queries"] for entry in groups.values()) <= len(held_out.queries)
    assert set(report["beyond"]["popular"]) == {
        f"{x}@10" for x in ("coverage", "gini", "novelty_bits", "popularity_lift", "diversity")
    }
    assert json.loads(json.dumps(report)) == report
    assert report["dataset"]["items"] == dataset.n_items == report["protocol"]["catalogue"]


def test_the_same_seed_gives_the_same_report(report: Any, dataset: Dataset, held_out: HeldOut) -> None:
    again = judge([Cheat(held_out, dataset)], dataset, FAST, held_out=held_out).json_values()
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in report.items() if k != "seconds"}


def test_without_a_model_and_with_a_sample(dataset: Dataset) -> None:
    done: list[tuple[int, int]] = []
    settings = FAST.model_copy(update={"max_queries": 30, "baselines": ["popular", "ease"], "max_ease_items": 10})
    report = judge([], dataset, settings, progress=lambda a, b: done.append((a, b)))
    assert report.protocol.queries == 30 and report.differences == {} and set(report.systems) == {"popular", "oracle"}
    assert report.verdict.startswith("No model was evaluated. The best baseline is popularity (0.0")
    assert "max_ease_items = 10" in report.left_out["ease"]
    assert done == sorted(done) and done[-1] == (120, 120)


def test_no_question_is_an_error(dataset: Dataset, held_out: HeldOut) -> None:
    none = HeldOut(held_out.queries.slice(0, 0), np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
    with pytest.raises(DataError, match="no query"):
        judge([], dataset, FAST, held_out=none)
    with pytest.raises(ConfigError, match="Did you mean 'NDCG'"):
        judge([], dataset, FAST, held_out=held_out, metric="NDGC@10")
    with pytest.raises(ConfigError, match="Did you mean 'ials'"):
        fit_baseline("ial", dataset, FAST)


def test_tuning_keeps_the_best_choice_on_validation(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = [{"days": 1}, {"days": 60}, {"days": 4000}]
    monkeypatch.setitem(GRIDS, "recent", grid)
    valid, tuned = dataset.held_out("valid"), FAST.model_copy(update={"tune_baselines": True})
    figures = [evaluate(BASELINES["recent"](dataset, **choice), valid, dataset, FAST).mean("NDCG@10") for choice in grid]
    assert len(set(figures)) == 3
    assert fit_baseline("recent", dataset, tuned).settings == grid[int(np.argmax(figures))]
    assert fit_baseline("recent", dataset, FAST).settings == {"days": 30}


def test_bootstrap_weighs_users_with_all_their_queries() -> None:
    """Compare with the textbook bootstrap: draw users, take all rows of each, average."""
    rng = np.random.default_rng(0)
    user = rng.integers(0, 40, 300)
    table = rng.normal(size=(300, 2)) + user[:, None] % 3
    draws = resample(table, user, 4_000, seed=1)
    slow = []
    for _ in range(2_000):
        rows = np.concatenate([np.flatnonzero(user == u) for u in rng.choice(np.unique(user), len(np.unique(user)))])
        slow.append(table[rows].mean(0))
    np.testing.assert_allclose(draws.mean(0), np.mean(slow, 0), atol=0.02)
    np.testing.assert_allclose(draws.std(0), np.std(slow, 0), rtol=0.08)
    naive = resample(table, np.arange(300), 4_000, seed=1)
    assert (draws.std(0) > 1.3 * naive.std(0)).all()  # ignoring whose query it is would promise too much


def test_an_interval_covers_the_truth_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        sample = rng.exponential(size=(150, 1))
        interval = intervals(["x"], sample.mean(0), resample(sample, np.arange(150), 400, seed=trial))["x"]
        covered += interval.low <= 1 <= interval.high
    assert 180 <= covered <= 198


def test_paired_draws_make_differences_sharp() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(size=500)
    draws = resample(np.stack([base, base + 0.01], 1), np.arange(500), 200, seed=0)
    np.testing.assert_allclose(draws[:, 1] - draws[:, 0], 0.01)


def differences(**others: tuple[float, float, float]) -> Any:
    return {name: {"NDCG@10": Interval(value=f[0], low=f[1], high=f[2])} for name, f in others.items()}


def test_verdicts() -> None:
    figures = {"two-tower": 0.05, "ials": 0.0469, "popular": 0.01, "oracle": 0.2}
    better = differences(ials=(0.0031, 0.0012, 0.005), popular=(0.04, 0.03, 0.05), oracle=(-0.15, -0.2, -0.1))
    assert verdict(figures, better, "two-tower", "NDCG@10") == (
        "Better than iALS, the best baseline (+0.0031 NDCG@10; 95 % interval +0.0012 to +0.0050)."
    )
    close = differences(ials=(0.0031, -0.0012, 0.0074), popular=(0.04, 0.03, 0.05))
    assert verdict(figures, close, "two-tower", "NDCG@10") == (
        "A tie with iALS, the best baseline (+0.0031 NDCG@10; the interval includes zero)."
    )
    zero = differences(ials=(0.0, 0.0, 0.0), popular=(0.04, 0.04, 0.04))
    assert verdict(figures, zero, "two-tower", "NDCG@10") == "A tie with iALS, the best baseline (no difference in NDCG@10)."
    worse = differences(ials=(0.003, 0.001, 0.005), popular=(-0.02, -0.03, -0.01))
    assert verdict({**figures, "popular": 0.07}, worse, "two-tower", "NDCG@10") == (
        "Worse than popularity, the best baseline (−0.0200 NDCG@10; 95 % interval −0.0300 to −0.0100). "
        "Better than iALS (+0.0030 NDCG@10; 95 % interval +0.0010 to +0.0050)."
    )
    barely = differences(popular=(0.5, 0.5, 0.5), ials=(0.0002, 0.00003, 0.0004))
    assert verdict({**figures, "popular": 0.0}, barely, "two-tower", "NDCG@10").endswith("interval +0.00003 to +0.0004).")
    assert verdict({"two-tower": 0.5, "popular": 0.0}, barely, "two-tower", "NDCG@10") == (
        "Better than popularity, the best baseline (+0.5000 NDCG@10; the same for every user: no interval)."
    )
    assert verdict({"two-tower": 0.05, "oracle": 0.2}, {}, "two-tower", "NDCG@10") == (
        "two-tower reaches 0.0500 NDCG@10. No baseline was evaluated."
    )


def test_the_verdict_names_every_baseline_that_is_better_and_judges_the_refreshed_index() -> None:
    baselines = {"ials": 0.23, "nearby": 0.22, "item_knn": 0.21, "ease": 0.1}
    figures = {"two-tower": 0.2, "two-tower, refreshed every day": 0.24, **baselines}
    behind = differences(
        **{"two-tower, refreshed every day": (-0.04, -0.05, -0.03)},
        ials=(-0.03, -0.04, -0.02),
        nearby=(-0.02, -0.03, -0.01),
        item_knn=(-0.01, -0.02, -0.001),
        ease=(0.1, 0.05, 0.15),
    )
    tied = {**behind, **differences(ials=(-0.03, -0.07, 0.01))}
    assert verdict(figures, tied, "two-tower", "NDCG@10") == (
        "A tie with iALS, the best baseline (−0.0300 NDCG@10; the interval includes zero). "
        "Worse than nearby popularity and item-kNN."
    )
    ahead = differences(ials=(0.01, 0.002, 0.02))
    said = "Worse than iALS, the best baseline (−0.0300 NDCG@10; 95 % interval −0.0400 to −0.0200). "
    assert verdict(figures, behind, "two-tower", "NDCG@10") == said + "Also worse than nearby popularity and item-kNN."
    assert verdict(figures, behind, "two-tower", "NDCG@10", ahead) == (
        said + "Also worse than nearby popularity and item-kNN. "
        "With a refreshed index: better than iALS (+0.0100 NDCG@10; 95 % interval +0.0020 to +0.0200)."
    )


def test_slices_by_hand(dataset: Dataset, held_out: HeldOut) -> None:
    found, size = slices(held_out, dataset), len(held_out.queries)
    lengths = held_out.queries.lengths
    assert found["history length"]["3–5"].tolist() == [3 <= n <= 5 for n in lengths]
    assert found["history length"]["21+"].sum() == (lengths > 20).sum()
    for title in ("history length", "user", "target item"):
        assert (np.sum(list(found[title].values()), 0) == 1).all(), title
    users = dataset.events.user_row[dataset.events.split == SPLITS["train"]]
    assert found["user"]["new"].tolist() == (~np.isin(held_out.queries.user_row, users)).tolist()
    new = dataset.item_train_count[first_target(held_out)] == 0
    np.testing.assert_array_equal(found["target item"]["new"], new)
    assert 0 < sum(mask.sum() for mask in found["city of the target"].values()) <= size


def test_head_torso_and_tail_hold_a_third_of_the_events_each(dataset: Dataset) -> None:
    kind, count = popularity_class(dataset), dataset.item_train_count
    shares = [count[kind == code].sum() / count.sum() for code in range(3)]
    assert all(0.25 < share < 0.42 for share in shares)
    assert count[kind == 0].min() >= count[kind == 1].max() >= count[kind == 1].min() >= count[kind == 2].max()
    assert (count[kind == 3] == 0).all() and (count[kind != 3] > 0).all()


def test_a_query_is_grouped_by_its_earliest_target() -> None:
    queries = Queries.of([[], []], time_s=DAY_S)
    held_out = HeldOut(queries, np.array([0, 2, 3]), np.array([4, 9, 7]), np.array([31, 30, 2]))
    assert first_target(held_out).tolist() == [9, 7]


def test_categories_are_those_of_the_items(dataset: Dataset) -> None:
    ragged = categories(dataset)
    assert ragged is not None
    offsets, code = ragged
    values = [[], [], *dataset.items["categories"].to_pylist()]
    names: dict[int, str] = {}
    for row, listed in enumerate(values):
        codes = code[offsets[row] : offsets[row + 1]].tolist()
        assert len(codes) == len(set(listed or []))
        if len(codes) == 1:
            assert names.setdefault(codes[0], (listed or [""])[0]) == (listed or [""])[0]

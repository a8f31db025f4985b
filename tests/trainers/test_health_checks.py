"""Test the health checks: measurements against independent formulas, and every check fires on a deliberately unhealthy run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.schema import FIRST_ROW, TRAIN, UNKNOWN
from twotower.trainers.health_checks import CHECKS, ValidationStats, advice_lines, diagnose
from twotower.trainers.health_measurements import (
    SAMPLE,
    BatchStats,
    VectorSpread,
    batch_stats,
    effective_rank,
    mean_cosine,
    question_loss,
    spread,
    untrained,
)
from twotower.trainers.health_monitor import HealthMonitor
from twotower.trainers.two_tower_trainer import TwoTowerTrainer
from twotower.utils.config import parse_config

from ..conftest import TOWER

WELL = ValidationStats(
    step=100,
    epoch=1,
    metric=0.1,
    training_loss=4.0,
    validation_loss=5.0,
    temperature=0.1,
    learns_temperature=True,
    items=VectorSpread(8.0, 0.4),
    users=VectorSpread(2.5, 0.7),
    batch_stats=BatchStats(0.05, 0.01, 500.0),
    popularity_lift=0.2,
    popular_lift=0.9,
    coverage=0.5,
    untrained=(),
)
LATER = replace(WELL, step=200, epoch=2, metric=0.11)
SICK: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("temperature", {"temperature": 0.01}, ("model.learn_temperature", "model.user_tower.dropout")),
    (
        "temperature",
        {"temperature": 1.0, "items": VectorSpread(8.0, -0.1), "users": VectorSpread(8.0, 0.0)},
        ("training.learning_rate",),
    ),
    ("collapse", {"items": VectorSpread(8.0, 0.96)}, ("training.learning_rate",)),
    ("collapse", {"users": VectorSpread(8.0, 0.96)}, ("training.learning_rate",)),
    ("dimensions", {"items": VectorSpread(2.9, 0.4)}, ("hidden_dims", "training.negatives_per_positive")),
    ("popularity", {"popularity_lift": 0.7}, ("model.user_tower.history_dropout",)),
    ("masked", {"batch_stats": BatchStats(0.21, 0.0, 30.0)}, ("training.negatives_per_positive", "full_softmax")),
    ("same_user", {"batch_stats": BatchStats(0.0, 0.26, 30.0)}, ("training.batch_size", "training.objective")),
    ("validation_loss", {"validation_loss": 5.2}, ("training.eval_metric",)),
    ("unknown", {"untrained": ("user.id",)}, ("model.user_tower.id_dropout",)),
]


def names(*history: ValidationStats) -> list[str]:
    return [advice.name for advice in diagnose(history)]


# Figures.


def test_effective_rank_counts_directions() -> None:
    axes = torch.eye(5)
    assert effective_rank(torch.cat([axes, -axes])) == pytest.approx(5)
    assert effective_rank(torch.cat([axes[:2], -axes[:2]])) == pytest.approx(2)
    assert effective_rank(torch.cat([axes[:1], -axes[:1]])) == pytest.approx(1)
    assert effective_rank(axes[:1].repeat(7, 1)) == effective_rank(axes[:0]) == 0
    ahead = axes[4] * 100 + torch.cat([axes[:2], -axes[:2]])  # what all share is no difference
    assert effective_rank(ahead) == pytest.approx(2)


def test_effective_rank_is_the_entropy_of_the_covariance() -> None:
    vectors = torch.randn(200, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([3.0, 2, 1, 1, 0.5, 0.1])
    share = np.linalg.eigvalsh(np.cov(vectors.numpy().astype(np.float64).T))
    share /= share.sum()
    assert effective_rank(vectors) == pytest.approx(float(np.exp(-(share * np.log(share)).sum())), rel=1e-6)


def test_mean_cosine_is_that_of_all_pairs() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(30, 4, generator=torch.Generator().manual_seed(2)), dim=1)
    pairs = [float(vectors[i] @ vectors[j]) for i in range(30) for j in range(30) if i != j]
    assert mean_cosine(vectors) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert mean_cosine(vectors[:1].repeat(9, 1)) == pytest.approx(1) and mean_cosine(vectors[:1]) == mean_cosine(vectors[:0]) == 0


def test_large_catalogues_are_sampled_evenly() -> None:
    first, last = torch.tensor([[1.0, 0]]).repeat(SAMPLE, 1), torch.tensor([[0, 1.0]]).repeat(SAMPLE, 1)
    assert spread(torch.cat([first, last])).cosine == pytest.approx(0.5, abs=0.01)


def test_question_loss_is_the_cross_entropy_over_all_items(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(3)
    users, items = torch.randn(5, 4, generator=random), torch.randn(12, 4, generator=random)
    offsets, answers = np.array([0, 1, 3, 3, 4, 6, 7]), np.array([2, 3, 11, 5, 2, 9, 4])
    logits = (users @ items[FIRST_ROW:].T / 0.2).repeat_interleave(torch.tensor([1, 2, 0, 1, 2]), 0)
    expected = float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(answers[:6] - FIRST_ROW)))
    for block in (1, 30, 10**6):
        monkeypatch.setattr("twotower.trainers.health_measurements.BLOCK", block)
        assert question_loss(users, items, offsets, answers, 0.2) == pytest.approx(expected, rel=1e-5)


# Judgement.


def test_a_healthy_run_is_left_alone() -> None:
    assert names() == names(WELL) == names(WELL, LATER) == []


@pytest.mark.parametrize(("check", "sick", "settings"), SICK)
def test_every_check_says_what_it_measured_and_what_to_change(check: str, sick: dict[str, Any], settings: tuple[str, ...]) -> None:
    history = [WELL, replace(WELL, **sick), replace(LATER, **sick)]
    assert check in names(*history) and names(*history[:2]) in ([], [check])
    message = next(advice.message for advice in diagnose(history) if advice.name == check)
    assert all(setting in message for setting in settings) and any(digit.isdigit() for digit in message)
    assert names(*history, LATER, LATER) == []  # a run that recovers gets no advice


def test_no_check_is_left_out() -> None:
    assert {check for check, *_ in SICK} | {"best_is_past"} == CHECKS.keys()


def test_the_best_is_long_past() -> None:
    def run(*metrics: float, loss: float = -0.1) -> list[ValidationStats]:
        return [replace(WELL, step=100 * (i + 1), epoch=i + 1, metric=m, training_loss=4 + loss * i) for i, m in enumerate(metrics)]

    assert names(*run(0.1, 0.2, 0.15, 0.14)) == []  # two validations may be chance
    assert names(*run(*[0.1] * 9, 0.2, 0.15, 0.14, 0.13)) == []  # and three of thirteen are no waste yet
    sick = run(0.1, 0.2, 0.15, 0.14, 0.13)
    assert names(*sick) == ["best_is_past"]
    assert "overfitting" in diagnose(sick)[0].message and "step 200 of 500" in diagnose(sick)[0].message
    assert "training.learning_rate" in diagnose(run(0.1, 0.2, 0.15, 0.14, 0.13, loss=0.1))[0].message
    assert "loss did not change" in diagnose(run(0.1, 0.2, 0.15, 0.14, 0.13, loss=1e-5))[0].message
    assert names(*run(*[0.0] * 9)) == [], "nothing was found: no validation is the best one"


def test_a_temperature_fixed_by_hand_and_a_loss_that_rises_with_a_falling_metric_are_not_meant() -> None:
    fixed = replace(WELL, temperature=1.0, learns_temperature=False, items=VectorSpread(8.0, 0.0), users=VectorSpread(8.0, 0.0))
    assert names(fixed, fixed) == []
    assert "validation_loss" not in names(WELL, replace(LATER, validation_loss=6.0, metric=0.05))


def test_facts_come_back_from_json() -> None:
    stats = replace(WELL, untrained=("item.id",), validation_loss=1 / 3)
    assert ValidationStats.of(json.loads(json.dumps(asdict(stats)))) == stats


def test_advice_lines_keep_the_last_message_of_each_check() -> None:
    rows = [
        {"step": 10, "advice": [{"name": "a", "message": "first."}]},
        {"step": 15, "loss": 3.0},
        {"step": 20, "advice": [{"name": "b", "message": "two."}, {"name": "a", "message": "again."}]},
        {"step": 1_000, "advice": []},
    ]
    assert advice_lines(rows) == ["Step 20: again.", "Step 20: two."]


# Real runs.


class Watched(TwoTowerTrainer):
    """A trainer that gives access to the rows of its health monitor."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        logged = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        return [row for row in logged if "stats" in row]


Run = Callable[..., Watched]


@pytest.fixture
def run(dataset: Dataset, tmp_path: Path) -> Run:
    def train(on: Dataset = dataset, *, user: Any = None, item: Any = None, **training: Any) -> Watched:
        common = {
            "batch_size": 256,
            "max_steps": 20,
            "eval_every_epochs": 0.5,
            "log_every": 1,
            "learning_rate": 0.01,
            "patience": 50,
        }
        towers = {"user_tower": {**TOWER, **(user or {})}, "item_tower": {**TOWER, **(item or {})}}
        model = {**towers, "temperature": 0.1, "learn_temperature": True}
        trainer = Watched(on, parse_config({"model": model, "training": {**common, **training}}), tmp_path / "run")
        trainer.fit()
        return trainer

    return train


def said(trainer: Watched) -> set[str]:
    assert advice_lines(trainer.rows) or not trainer.health.warned
    return trainer.health.warned


def test_a_healthy_run_hears_nothing(run: Run) -> None:
    trainer = run(learning_rate=0.005)
    assert len(trainer.rows) == 3 and said(trainer) == set()
    stats = trainer.health.history[-1]
    assert stats.metric > 0.05 and 0 < stats.coverage <= 1 and stats.popular_lift > stats.popularity_lift


def test_steps_far_too_large_are_seen(run: Run) -> None:
    """The temperature reaches its bound, and the vectors collapse."""
    assert {"temperature", "collapse"} <= said(run(learning_rate=1.0))


def test_a_batch_of_a_few_users_and_no_further_negatives_is_seen(run: Run) -> None:
    trainer = run(objective="next_event", negatives_per_positive=0, batch_size=64, max_steps=2)
    assert {"masked", "same_user"} <= said(trainer)
    assert trainer.health.history[-1].batch_stats.negatives < 10


def test_no_negatives_over_a_tiny_catalogue_are_seen(run: Run) -> None:
    assert "masked" in said(run(negatives_per_positive=0, max_steps=1))


@pytest.mark.parametrize(("user", "item", "untrained"), [(0.0, 0.1, ["user.id"]), (0.1, 0.0, ["item.id"])])
def test_ids_that_are_never_hidden_leave_unknown_untrained(run: Run, user: float, item: float, untrained: list[str]) -> None:
    trainer = run(user={"id_dropout": user}, item={"id_dropout": item}, max_steps=3)
    assert said(trainer) == {"unknown"} and trainer.rows[-1]["stats"]["untrained"] == untrained


def test_a_resumed_doctor_remembers(run: Run) -> None:
    trainer = run(user={"id_dropout": 0.0}, item={"id_dropout": 0.0}, max_steps=3)
    again = HealthMonitor(trainer.model, trainer.dataset, trainer.held_out, trainer.config)
    again.restore([{"step": 1, "loss": 3.0}, *trainer.rows])
    assert again.history == trainer.health.history and again.warned == {"unknown"}


def test_what_a_batch_contrasts_is_counted_right(run: Run) -> None:
    trainer = run(max_steps=1)
    loader, events = trainer.loader, trainer.dataset.events
    for settings in ("infonce", "sampled_softmax"):
        config = parse_config({"training": {"batch_size": 64, "loss": settings, "negatives_per_positive": 1}})
        loader = type(loader)(trainer.dataset, trainer.store, config)
        members = loader.plan(0)[0]
        batch = loader.batch(members, 0, 0)
        user, target = loader.events.user_row[members], loader.events.history.item_row[members]
        column = torch.cat([part.row for part in batch.items]).numpy()
        liked = {
            (u, i)
            for u, i, split, positive in zip(events.user_row, events.item_row, events.split, events.positive, strict=True)
            if split == TRAIN and positive
        }
        stands = [c for c, w in zip(column, batch.log_weight, strict=True) if w > -torch.inf]
        pairs = [(u, t, c) for u, t in zip(user, target, strict=True) for c in stands]
        masked = sum(c != t and (u, c) in liked for u, t, c in pairs)
        left = sum(c != t and (u, c) not in liked for u, t, c in pairs)
        same = np.mean([user[a] == user[b] for a in range(len(user)) for b in range(len(user)) if a != b])
        expected = BatchStats(masked / len(pairs), float(same), left / len(user))
        assert asdict(batch_stats(batch)) == pytest.approx(asdict(expected))


def test_the_row_unknown_is_untrained_until_it_moves(run: Run) -> None:
    trainer = run(max_steps=1)
    assert untrained(trainer.model) == ()
    with torch.no_grad():
        trainer.model.tables.lookup("user.id").weight[UNKNOWN] = 0
    assert untrained(trainer.model) == ("user.id",)


@pytest.mark.slow
def test_vectors_too_narrow_for_the_catalogue_are_seen(run: Run) -> None:
    narrow = {"embedding_dim": 4, "hidden_dims": [2]}
    assert "dimensions" in said(run(user=narrow, item=narrow, max_steps=40))


@pytest.mark.slow
def test_learning_by_heart_is_seen(run: Run) -> None:
    """The validation loss rises long before the metric falls; later the best result is long past."""
    trainer = run(max_steps=300, eval_every_epochs=1.0)
    assert {"validation_loss", "best_is_past"} <= said(trainer)
    heard = {one["name"]: row["step"] for row in reversed(trainer.rows) for one in row["advice"]}  # the first time of each
    assert heard["validation_loss"] < heard["best_is_past"]


@pytest.mark.slow
def test_the_same_list_for_all_users_is_detected(run: Run, tmp_path: Path) -> None:
    """Events without preferences: only popularity can be learned. (iALS factors also fit noise: .73 of one list's lift.)"""
    draw, chance = np.random.default_rng(0), 1 / np.arange(1, 201) ** 0.6
    lines = [[f"u{u}", *(f"i{i}" for i in draw.choice(200, 20, replace=False, p=chance / chance.sum()))] for u in range(300)]
    (tmp_path / "visits.txt").write_text("".join(" ".join(line) + "\n" for line in lines))
    data = {"source": "sequences", "path": str(tmp_path), "sequences": {"train": "visits.txt"}}
    prepare(parse_config({"data": data, "prepare": {"split": {"kind": "leave_one_out"}, "text_dim": 0}}), tmp_path / "dataset")
    trainer = run(Dataset.open(tmp_path / "dataset"), item={"id_init": "random"}, max_steps=60, eval_every_epochs=1.0)
    assert "popularity" in said(trainer) and {"dimensions", "temperature"}.isdisjoint(said(trainer))

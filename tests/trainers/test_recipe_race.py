"""Test the recipe race: it keeps the better candidate and the user's settings, and continues after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from twotower.data.dataset import Dataset
from twotower.errors import TrainingError
from twotower.evaluation.insights import insights
from twotower.pipeline.stages import run_all, train_stage
from twotower.trainers import recipe_race
from twotower.trainers.recipe_race import CANDIDATES, RUNGS, choose_recipe, entrants, is_given, read_record
from twotower.trainers.training_state import TrainingState
from twotower.trainers.two_tower_trainer import TwoTowerTrainer
from twotower.utils.config import Config, load_config

QUALITY = {name: float(number) for number, name in enumerate(CANDIDATES)}
SMALL = [
    "model.user_tower.embedding_dim=8",
    "model.item_tower.embedding_dim=8",
    "prepare.text_dim=8",
    "training.num_epochs=4",
    "evaluation.baselines=[popular]",
    "evaluation.bootstrap_resamples=20",
]


def name_of(config: Config) -> str:
    """Return the name of the candidate that a configuration belongs to."""
    return next(one.name for one in entrants(load_config()) if one.config.training.objective == config.training.objective)


class Fits:
    """Pretend to train: the metric is the candidate's quality times its share of the steps."""

    def __init__(self, quality: dict[str, float], stop_at: int | None = None) -> None:
        self.quality, self.stop_at = quality, stop_at
        self.calls: list[tuple[str, float, bool]] = []

    def __call__(self, config: Config, out: Path, resume: bool, stop_frac: float) -> TrainingState:
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        name, share = name_of(config), stop_frac
        self.calls.append((name, share, resume))
        out.mkdir(parents=True, exist_ok=True)
        for file in ("last.pt", "best.pt", "metrics.jsonl"):
            (out / file).write_text(name)
        return TrainingState(step=round(100 * share), total_steps=100, reached=self.quality[name] * share, best_step=1)


@pytest.mark.parametrize("best", list(CANDIDATES))
def test_the_candidate_with_the_best_validation_goes_on(best: str, tmp_path: Path) -> None:
    fit = Fits({name: 0.9 if name == best else 0.5 for name in CANDIDATES})
    config, record, started = choose_recipe(entrants(load_config()), tmp_path, fit)
    assert record is not None and started
    assert (name_of(config), record["chosen"]) == (best, best)
    assert config.training.recipe == "fixed"
    assert {row["name"] for row in record["tried"]} == set(CANDIDATES)
    assert best in record["why"] and all(row["results"][0]["seconds"] >= 0 for row in record["tried"])
    assert (tmp_path / "last.pt").read_text() == best, "its steps are not lost"
    assert not (tmp_path / "recipe").exists(), "the checkpoints of the others are"


def test_a_close_candidate_is_compared_again_and_may_win(tmp_path: Path) -> None:
    class Late(Fits):
        def __call__(self, config: Config, out: Path, resume: bool, stop_frac: float) -> TrainingState:
            reached = super().__call__(config, out, resume, stop_frac)
            late = name_of(config) == "next event"
            values = {RUNGS[0]: 0.95 if late else 1.0, RUNGS[1]: 1.2 if late else 1.1}
            reached.reached = values[stop_frac]
            return reached

    fit = Late(QUALITY)
    _, record, _ = choose_recipe(entrants(load_config()), tmp_path, fit)
    assert record is not None and record["chosen"] == "next event"
    assert [(share, resume) for name, share, resume in fit.calls if name == "any event"] == [(RUNGS[0], False), (RUNGS[1], True)]


def test_of_equal_candidates_the_first_is_taken(tmp_path: Path) -> None:
    first = next(iter(CANDIDATES))
    _, record, _ = choose_recipe(
        entrants(load_config()), tmp_path, Fits({name: 1.0 - 0.02 * (name == first) for name in CANDIDATES})
    )
    assert record is not None and record["chosen"] == first and "preferred" in record["why"]


def test_a_candidate_that_is_far_behind_costs_one_rung(tmp_path: Path) -> None:
    fit = Fits({"any event": 1.0, "next event": 0.5})
    _, record, _ = choose_recipe(entrants(load_config()), tmp_path, fit)
    assert record is not None and record["chosen"] == "any event"
    assert sorted(fit.calls) == [("any event", RUNGS[0], False), ("next event", RUNGS[0], False)]


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("seed=3", list(CANDIDATES)),
        ("training.objective=next_event", ["next event"]),
        ("training.objective=any_event", ["any event"]),
        ("training.batch_size=256", ["any event"]),
        ("training.recipe=fixed", ["as configured"]),
    ],
)
def test_the_race_settles_only_what_the_user_left(override: str, names: list[str]) -> None:
    config = load_config(None, [override])
    found = entrants(config)
    assert [one.name for one in found] == names
    key, _, value = override.partition("=")
    for one in found:
        section: Any = one.config
        for part in key.split("."):
            section = getattr(section, part)
        assert str(section) == value and key not in one.settings


def test_a_setting_of_the_user_holds_in_every_candidate() -> None:
    config = load_config(None, ["model.user_tower.num_blocks=1", "model.user_tower.pooling=mean"])
    assert is_given(config, "model.user_tower.pooling") and not is_given(config, "training.objective")
    for one in entrants(config):
        assert (one.config.model.user_tower.num_blocks, one.config.model.user_tower.pooling) == (1, "mean")


@pytest.mark.parametrize(("events", "tokens"), [(4_000, 512), (45_000, 1024), (128_000, 4096), (7_000_000, 4096)])
def test_small_datasets_have_small_batches_of_tokens(events: int, tokens: int) -> None:
    sizes = {one.name: one.config.training.batch_size for one in entrants(load_config(), events=events)}
    assert sizes == {"any event": load_config().training.batch_size, "next event": tokens}
    given = load_config(None, ["training.objective=next_event", "training.batch_size=300"])
    assert entrants(given, events=events)[0].config.training.batch_size == 300


def test_without_order_or_a_validation_part_there_is_no_race(tmp_path: Path) -> None:
    for found in (entrants(load_config(), ordered=False), entrants(load_config(), validated=False)):
        assert [one.name for one in found] == [next(iter(CANDIDATES))]
        fit = Fits(QUALITY)
        _, record, started = choose_recipe(found, tmp_path, fit)
        assert record is None and not started and not fit.calls


def test_a_race_cut_off_goes_on_and_is_not_run_twice(tmp_path: Path) -> None:
    first = Fits(QUALITY, stop_at=1)
    with pytest.raises(KeyboardInterrupt):
        choose_recipe(entrants(load_config()), tmp_path, first)
    again = Fits(QUALITY)
    _, record, _ = choose_recipe(entrants(load_config()), tmp_path, again, resume=True)
    assert {name for name, _, _ in again.calls}.isdisjoint({name for name, _, _ in first.calls})
    assert read_record(tmp_path) == record
    later = Fits({name: -quality for name, quality in QUALITY.items()})
    config, same, started = choose_recipe(entrants(load_config()), tmp_path, later, resume=True)
    assert same == record and started and not later.calls and record is not None
    assert name_of(config) == record["chosen"]
    with pytest.raises(TrainingError, match="chose the recipe"):
        choose_recipe(entrants(load_config(None, ["training.recipe=fixed"])), tmp_path, later, resume=True)


def test_a_race_cut_off_in_the_folder_of_an_older_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_text("older")
    with pytest.raises(KeyboardInterrupt):
        choose_recipe(entrants(load_config()), tmp_path, Fits(QUALITY, stop_at=0))
    fit = Fits(QUALITY)
    _, record, started = choose_recipe(entrants(load_config()), tmp_path, fit, resume=True)
    assert record is not None and started and (tmp_path / "last.pt").read_text() == record["chosen"]


def test_a_run_from_before_the_race_goes_on_without_one(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_text("older")
    fit = Fits(QUALITY)
    config, record, started = choose_recipe(entrants(load_config()), tmp_path, fit, resume=True)
    assert (record, started, fit.calls, name_of(config)) == (None, True, [], next(iter(CANDIDATES)))


def test_a_new_run_forgets_the_race_before(tmp_path: Path) -> None:
    choose_recipe(entrants(load_config()), tmp_path, Fits(QUALITY))
    fit = Fits({name: -quality for name, quality in QUALITY.items()})
    _, record, _ = choose_recipe(entrants(load_config()), tmp_path, fit)
    assert record is not None and record["chosen"] == min(QUALITY, key=lambda name: QUALITY[name])
    assert len(fit.calls) >= len(CANDIDATES)


@pytest.mark.parametrize("override", ["seed=0", "training.eval_every_epochs=9", "training.max_steps=11"])
def test_a_run_is_the_same_from_its_manifest_without_the_race(
    override: str, town: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first validation is the best one. The last two settings have none at the steps where the race validates."""
    measured = TwoTowerTrainer.validate

    def falling(trainer: TwoTowerTrainer) -> dict[str, float] | None:
        return {name: value + 1.0 / trainer.state.step for name, value in (measured(trainer) or {}).items()}

    monkeypatch.setattr(TwoTowerTrainer, "validate", falling)
    config = load_config(None, [*SMALL, override, f"data.path={town.raw}"])
    report = run_all(config, tmp_path / "raced")
    assert report is not None
    manifest = json.loads((tmp_path / "raced" / "model" / "manifest.json").read_text())
    assert "Training recipe" in (tmp_path / "raced" / "report.html").read_text()
    assert report.recipe is not None and report.recipe.json_values() == manifest["recipe"] and report.recipe.chosen in CANDIDATES
    (tmp_path / "fixed.yaml").write_text(json.dumps(manifest["config"]))
    fixed = load_config(tmp_path / "fixed.yaml")
    best = train_stage(fixed, tmp_path / "raced" / "dataset", tmp_path / "again")
    assert best.json_values() == manifest["best"]
    runs = [tmp_path / "raced" / "model", tmp_path / "again"]
    one, other = (torch.load(run / "last.pt", weights_only=True)["model"] for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((tmp_path / "again" / "manifest.json").read_text())["recipe"] is None


def test_a_race_of_real_candidates_keeps_the_one_that_learns(town: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = {"stuck": {"training.learning_rate": 1e-9}, "learns": {"training.learning_rate": 0.01}}
    monkeypatch.setattr(
        recipe_race, "CANDIDATES", {name: {"training.objective": "any_event", **one} for name, one in candidates.items()}
    )
    config = load_config(None, [*SMALL, "model.item_tower.id_init=random"])
    train_stage(config, town.folder, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["recipe"]["chosen"] == "learns" and manifest["config"]["training"]["learning_rate"] == 0.01


def test_an_empty_validation_part_is_found_before_the_race(town: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = Dataset.open(town.folder).held_out("valid", max_queries=0)
    monkeypatch.setattr(Dataset, "held_out", lambda *_, **__: none)
    with pytest.raises(TrainingError, match=r"The validation part of .* is empty"):
        train_stage(Config(), town.folder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_targets_that_cannot_be_found_are_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every user repeats one item: lists without seen items find nothing, and no candidate counts as better."""
    rows = [f"u{user},i{user % 5},{1_577_836_800 + day * 86_400}" for day in range(1, 31) for user in range(40)]
    (tmp_path / "log.csv").write_text("user,item,time\n" + "".join(f"{row}\n" for row in rows))
    data = ["data.source=tables", f"data.interactions.path={tmp_path / 'log.csv'}", "data.interactions.user_id=user"]
    data += ["data.interactions.item_id=item", "data.interactions.time=time"]
    with caplog.at_level("INFO"):
        report = run_all(load_config(None, [*SMALL, *data]), tmp_path / "run")
    assert "100 % of the 120 validation targets are in the history of their query." in caplog.text
    assert "overfitting" not in caplog.text
    assert report is not None and report.protocol.seen_targets == report.protocol.targets
    assert insights(report)[-1].startswith("100 % of the 120 test targets are in the history")
    assert report.verdict.startswith("A tie with popularity, the best baseline (no difference in NDCG@10).")


def test_explicit_negatives_add_a_candidate_of_each_recipe() -> None:
    found = entrants(load_config(), negatives=True)
    assert [one.name for one in found] == [*CANDIDATES, *(f"{name}, negatives x 0.1" for name in CANDIDATES)]
    assert [one.config.training.negative_weight for one in found] == [None, None, 0.1, 0.1]
    given = entrants(load_config(None, ["training.negative_weight=0.5"]), negatives=True)
    assert [one.name for one in given] == [*CANDIDATES] and {one.config.training.negative_weight for one in given} == {0.5}
    fixed = entrants(load_config(None, ["training.recipe=fixed"]), negatives=True)
    assert len(fixed) == 1 and fixed[0].config.training.negative_weight is None

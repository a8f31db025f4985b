"""Test the search for settings: what it finds, how it continues, and what it says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from twotower.cli import main
from twotower.data.dataset import Dataset
from twotower.errors import DataError, TrainingError
from twotower.pipeline import search_space
from twotower.pipeline.stages import as_made
from twotower.pipeline.tune import TrialWatcher, tune_stage
from twotower.pipeline.tune_result import BEST, ROWS, VALUES, lead, result_of, write_result
from twotower.pipeline.tune_study import TuningStudy
from twotower.schema import TEST
from twotower.trainers.callbacks import Training
from twotower.utils.array_files import open_arrays, write_arrays
from twotower.utils.config import Config, load_config, parse_config

from ..conftest import Town

SETTINGS: dict[str, Any] = {  # what is given is not searched: few settings are left, so that the tests are fast
    "model": {
        "user_tower": {"embedding_dim": 8, "norm_shrinkage": 2, "dropout": 0.3, "id_dropout": 0.5, "max_history": 20},
        "item_tower": {"id_init": "random", "neighbour_dropout": 0.3, "id_dropout": 0.1},
    },
    "training": {
        "max_steps": 8,
        "eval_every_epochs": 0.2,
        "learning_rate": 0.01,
        "checkpoint_every_s": 0.01,
        "negatives_per_positive": 4,
    },
    "evaluation": {"bootstrap_resamples": 100},
}


@pytest.fixture(scope="module")
def dataset(town: Town) -> Dataset:
    return Dataset.open(town.folder)


@pytest.fixture(scope="module")
def searched(town: Town, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of four trials."""
    out = tmp_path_factory.mktemp("tune") / "study"
    tune_stage(parse_config(SETTINGS), town.folder, out, hours=1, most_trials=4)
    return out


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / ROWS).read_text().splitlines()]


def results(out: Path) -> list[tuple[Any, ...]]:
    """Return the results of a study without times."""
    return [(row["trial"], row["state"], row["NDCG@10"], row["steps"], row["settings"]) for row in rows(out)]


# What a search finds.


def test_a_search_starts_with_the_default_recipes_and_keeps_every_trial(searched: Path, dataset: Dataset) -> None:
    found = rows(searched)
    assert [row["default_recipe"] for row in found] == ["any event", "next event", None, None]
    assert [row["trial"] for row in found] == [0, 1, 2, 3]
    for row in found:
        assert row["state"] == "finished" and row["steps"] == 8 and row["seconds"] > 0
        folder = searched / "trials" / str(row["trial"])
        assert not list(folder.glob("*.pt"))
        logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        best = max(line["NDCG@10"] for line in logged if "NDCG@10" in line)
        assert row["NDCG@10"] == pytest.approx(best, abs=1e-12)
        values = np.load(folder / VALUES)
        assert len(values) == len(dataset.held_out("valid").queries) and values.mean() == row["NDCG@10"]
        assert row["settings"]["training"]["learning_rate"] == 0.01
        assert parse_config(row["settings"]).model.user_tower.embedding_dim == 8


def test_a_search_that_is_repeated_continues_as_one_without_a_break(searched: Path, town: Town, tmp_path: Path) -> None:
    config = parse_config(SETTINGS)
    for most in (1, 3, 4):
        tune_stage(config, town.folder, tmp_path / "parts", hours=1, most_trials=most)
        assert results(tmp_path / "parts") == results(searched)[:most]


def test_the_test_part_has_no_effect(searched: Path, town: Town, tmp_path: Path) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(town.folder, copy)
    rng = np.random.default_rng(0)
    for name, changed in (("events", "item_row"), ("item_events", "stars")):
        arrays = {key: np.array(value) for key, value in open_arrays(copy / f"{name}.safetensors").items()}
        test = arrays["split"] == TEST
        assert test.any()
        arrays[changed][test] = rng.permutation(arrays[changed][test])
        write_arrays(copy / f"{name}.safetensors", arrays)
    targets = [Dataset.open(folder).held_out("test").target_row.tolist() for folder in (copy, town.folder)]
    assert targets[0] != targets[1]
    tune_stage(parse_config(SETTINGS), copy, tmp_path / "study", hours=1, most_trials=3)
    assert results(tmp_path / "study") == results(searched)[:3]


def test_a_killed_trial_continues_from_its_checkpoint(
    searched: Path, town: Town, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_step, seen = TrialWatcher.on_step, []

    def interrupted(self: TrialWatcher, training: Training) -> None:
        on_step(self, training)
        seen.append((self.trial.number, training.step))
        if seen[-1] == (2, 5) and seen.count((2, 5)) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrialWatcher, "on_step", interrupted)
    config, out = parse_config(SETTINGS), tmp_path / "study"
    with pytest.raises(KeyboardInterrupt):
        tune_stage(config, town.folder, out, hours=1, most_trials=3)
    assert [row["state"] for row in rows(out)] == ["finished", "finished", "unfinished"]
    assert (out / "trials/2/last.pt").is_file()
    tune_stage(config, town.folder, out, hours=1, most_trials=3)
    assert seen.count((2, 1)) == 1, "the steps before the checkpoint are not repeated"
    assert results(out) == results(searched)[:3]


def test_when_the_time_is_over_a_trial_stops_and_continues_later(
    town: Town, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_step, shift = TrialWatcher.on_step, [0.0]
    clock = SimpleNamespace(time=lambda: time.time() + shift[0], perf_counter=time.perf_counter)

    def later(self: TrialWatcher, training: Training) -> None:
        shift[0] = 3600.0 * (training.step >= 3)
        on_step(self, training)

    config = parse_config(SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(TrialWatcher, "on_step", later)
        patch.setattr("twotower.pipeline.tune.time", clock)
        result = tune_stage(config, town.folder, tmp_path, hours=1, most_trials=1)
    (row,) = rows(tmp_path)
    assert (row["state"], row["steps"]) == ("unfinished", 3)
    assert "Repeat the command" in result.verdict() and "1 unfinished" in result.table()
    tune_stage(config, town.folder, tmp_path, hours=1, most_trials=1)
    (row,) = rows(tmp_path)
    assert (row["state"], row["steps"]) == ("finished", 8)


def test_a_trial_that_fails_is_counted_and_many_end_the_search(town: Town, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(search_space.RANGES, "training.learning_rate", FloatDistribution(2e-3, 1e300, log=True))
    settings = {**SETTINGS, "training": {name: value for name, value in SETTINGS["training"].items() if name != "learning_rate"}}
    with pytest.raises(TrainingError, match=r"3 trials in a row failed, the last one with: .* Lower training\.learning_rate"):
        tune_stage(parse_config(settings), town.folder, tmp_path, hours=1)
    found = rows(tmp_path)
    assert [row["state"] for row in found[:2]] == ["finished", "finished"] and found[-1]["state"] == "failed"
    assert "Lower training.learning_rate" in found[-1]["error"]


# What it says. The trials of these studies are not trained: their values are written down.


def study_with(tmp_path: Path, dataset: Dataset, *shifts: float) -> TuningStudy:
    """A study whose trials have the values of the first one, shifted on every query."""
    study = TuningStudy.open(tmp_path / "study", as_made(parse_config(SETTINGS), dataset), dataset)
    base = np.random.default_rng(0).random(len(dataset.held_out("valid").queries))
    for shift in shifts:
        with study.claim(None) as trial:
            assert trial is not None
            np.save(study.folder(trial.number) / VALUES, base + shift)
            for eighth in range(1, 9):
                trial.report(float((base + shift).mean()), eighth)
            trial.set_user_attr("steps", 8)
            trial.set_user_attr("seconds", 2.0)
            study.optuna.tell(trial, float((base + shift).mean()))
    return study


def test_a_better_trial_is_written_as_settings_that_load(tmp_path: Path, dataset: Dataset) -> None:
    study = study_with(tmp_path, dataset, 0.0, -0.1, 0.05, 0.2, -0.3)
    result = result_of(study, dataset)
    write_result(result)
    assert result.beats and result.best is not None and result.best.number == 3
    config = load_config(study.out / BEST)
    assert config == study.config(result.best) and config.training.recipe == "fixed"
    defaults, written = Config().model_dump(mode="json"), yaml.safe_load((study.out / BEST).read_text())
    assert all(defaults["training"][name] != value for name, value in written["training"].items())
    assert set(written) == {"data", "prepare", "model", "training", "evaluation"}
    queries = len(dataset.held_out("valid").queries)
    assert f"on {queries} validation queries, +0.2000 (+0.2000 to +0.2000)" in result.verdict()
    assert result.table().splitlines()[1].split()[0] == "3" and "Most important: " in result.table()
    assert sum(result.importances.values()) == pytest.approx(1)


def test_without_a_better_trial_no_settings_are_written(tmp_path: Path, dataset: Dataset) -> None:
    study = study_with(tmp_path, dataset, 0.0, -0.1, -0.05)
    (study.out / BEST).write_text("seed: 1\n")
    result = result_of(study, dataset)
    write_result(result)
    assert not result.beats and not (study.out / BEST).exists()
    assert result.verdict().startswith("No trial beats the default recipe by more than the noise: trial 2 has ")


def test_before_the_default_recipes_are_trained_nothing_is_compared(tmp_path: Path, dataset: Dataset) -> None:
    result = result_of(study_with(tmp_path, dataset, 0.0), dataset)
    assert result.default is None and not result.beats and "2 default recipes are not trained to the end yet" in result.verdict()


def test_a_trial_far_behind_is_pruned_and_no_candidate_for_the_best(tmp_path: Path, town: Town, dataset: Dataset) -> None:
    study = study_with(tmp_path, dataset, 0.0, 0.1, 0.2, 0.3)
    tune_stage(parse_config(SETTINGS), town.folder, study.out, hours=1, most_trials=5)
    last = rows(study.out)[-1]
    assert (last["state"], last["steps"]) == ("pruned", 2), "a quarter of the training"
    assert "5 trials: 4 finished, 1 pruned." in result_of(study, dataset).table()


def test_the_interval_allows_for_the_choice_among_the_trials() -> None:
    """All columns have the same mean: the best of them must not count as better, however many there are."""
    rng, wrong, alone = np.random.default_rng(0), 0, 0
    for _ in range(100):
        values = rng.normal(size=(200, 1)) + rng.normal(size=(200, 20))
        best = int(values[:, 1:].mean(0).argmax()) + 1
        wrong += lead(values, np.arange(200), best, 0, resamples=200).low > 0
        alone += lead(values[:, [best, 0]], np.arange(200), 0, 1, resamples=200).low > 0
    assert wrong <= 6 < alone


# What it refuses.


def test_two_processes_do_not_work_on_one_trial(tmp_path: Path, dataset: Dataset) -> None:
    studies = [TuningStudy.open(tmp_path / "study", parse_config(SETTINGS), dataset) for _ in range(2)]
    with studies[0].claim(None) as first, studies[1].claim(None) as second:
        assert first is not None and second is not None and (first.number, second.number) == (0, 1)
        with studies[0].claim(2) as third:
            assert third is None
    with studies[1].claim(2) as again:  # both are unfinished, and no process holds them now
        assert again is not None and again.number == 0 and again.params == first.params


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "inf"])
def test_the_time_must_be_above_0(town: Town, tmp_path: Path, hours: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--data", str(town.folder), "--out", str(tmp_path / "study"), "--hours", hours]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"twotower: error: The time of the search is {hours} hours. It must be a number above 0.")
    assert not (tmp_path / "study").exists()


def test_a_folder_with_something_else_is_refused(town: Town, tmp_path: Path, dataset: Dataset) -> None:
    config = parse_config(SETTINGS)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"is not a study of `twotower tune`: it contains notes\.txt"):
        tune_stage(config, town.folder, tmp_path, hours=1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    TuningStudy.open(tmp_path / "study", config, dataset)
    with pytest.raises(DataError, match=r"holds another study; the settings differ: settings\.seed"):
        TuningStudy.open(tmp_path / "study", config.model_copy(update={"seed": 5}), dataset)
    (tmp_path / "study/study.db").write_bytes(b"not a database" * 100)
    with pytest.raises(DataError, match=r"study\.db cannot be read or written: .*not a database"):
        TuningStudy.open(tmp_path / "study", config, dataset)


def test_the_path_of_a_study_may_have_any_letters(tmp_path: Path, dataset: Dataset) -> None:
    for name in ("a {b} c", "what?x=1#y", "50%"):
        (out := tmp_path / name / "study").parent.mkdir()
        TuningStudy.open(out, parse_config(SETTINGS), dataset)
        assert (out / "study.db").stat().st_size > 0


def test_data_without_a_validation_part_are_refused(town: Town, tmp_path: Path) -> None:
    from twotower.data.prepare import prepare

    values = town.config.model_dump(mode="json")
    values["prepare"]["split"]["valid"] = 0
    prepare(parse_config(values), tmp_path / "dataset")
    with pytest.raises(DataError, match=r"has no validation part\. .*prepare\.split\.valid above 0"):
        tune_stage(Config(), tmp_path / "dataset", tmp_path / "study", hours=1)
    assert not (tmp_path / "study").exists()


def test_without_its_extra_the_command_says_what_to_install(
    town: Town, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["tune", "--data", str(town.folder), "--out", str(tmp_path), "--hours", "1"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == "twotower: error: Not installed: optuna. This needs the extra 'tune'. Run: pip install 'two-tower-rec[tune]'"


# Several processes.


@pytest.mark.slow
def test_killed_with_two_processes_a_search_loses_no_trial(searched: Path, town: Town, tmp_path: Path) -> None:
    settings, out = tmp_path / "settings.yaml", tmp_path / "study"
    settings.write_text(yaml.safe_dump(SETTINGS))
    options = ["--config", settings, "--data", town.folder, "--out", out, "--hours", "1", "--processes", "2"]
    command = [sys.executable, "-m", "twotower", "tune", *map(str, options)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    finished: list[int] = []
    dataset, config = Dataset.open(town.folder), load_config(settings)
    while len(finished) < 2:
        time.sleep(0.2)
        assert running.poll() is None
        if (out / "study.db").is_file() and (out / "trials").is_dir():
            study = TuningStudy.open(out, as_made(config, dataset), dataset)
            finished = [one.number for one in study.trials() if one.state == TrialState.COMPLETE]
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    before = {one.number: one.value for one in study.trials() if one.state == TrialState.COMPLETE}
    most = max(len(study.trials()), 4)
    done = subprocess.run([*command, "--trials", str(most)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = rows(out)
    # A process whose parent was killed can begin one more trial before it notices.
    assert most <= len(found) <= most + 2 and {row["state"] for row in found} <= {"finished", "pruned"}
    assert before == {row["trial"]: row["NDCG@10"] for row in found if row["trial"] in before}
    assert results(out)[:2] == results(searched)[:2], "the default recipes have the same results in any number of processes"
    assert f"{len(found)} trials: " in done.stdout

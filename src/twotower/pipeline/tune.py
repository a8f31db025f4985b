"""Search for settings that beat the default recipe on the validation part (`twotower tune`).

A trial is one training with a fixed recipe. The first ones are the default recipes; Optuna proposes the others (multivariate TPE)
and ends those that are below the median of the finished ones at the same share of the training. The test part is not read.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from optuna.trial import Trial, TrialState

from twotower.bundle.bundle import load_trained
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store, split_moment
from twotower.errors import ConfigError, DataError, TrainingError, TwoTowerError
from twotower.evaluation.evaluator import evaluate
from twotower.models.neural_retriever import NeuralRetriever
from twotower.pipeline.stages import Watch, as_made, fit_within
from twotower.pipeline.tune_result import VALUES, TuneResult, result_of, write_result
from twotower.pipeline.tune_study import EIGHTHS, RECIPE, TuningStudy
from twotower.trainers.callbacks import Callback, Training
from twotower.trainers.new_item_popularity import calibrate_new_items
from twotower.trainers.optimizer import choose_device
from twotower.utils.config import Config
from twotower.utils.console import log, setup_logging
from twotower.utils.nouns import counted
from twotower.utils.registry import check_names
from twotower.utils.types import Float64

MAX_FAILURES = 3
"""Failed trials in a row after which the search ends with the error of the last one."""
POLL_S = 0.5


@dataclass(frozen=True)
class Search:
    """Settings and folders that every process of a search needs.

    Attributes
    ----------
    config
        The settings of the user, which are not searched.
    until_s
        Unix time in seconds at which trials are stopped.
    most_trials
        Number of trials in the whole study after which no new one begins; None: no limit.
    """

    config: Config
    data: Path
    out: Path
    until_s: float
    most_trials: int | None


def tune_stage(
    config: Config, data: Path, out: Path, *, hours: float, processes: int = 1, most_trials: int | None = None
) -> TuneResult:
    """Search for `hours`, write `trials.jsonl` to `out`, and `best.yaml` if a trial beats the default recipe.

    A study in `out` is continued: finished trials count, an unfinished one goes on from its last checkpoint.

    Parameters
    ----------
    config
        Settings. Those that were set explicitly are not searched.
    data
        A dataset with a validation part.
    processes
        Number of trials at the same time.
    most_trials
        Ends the search earlier, at this number of trials in the whole study.

    Raises
    ------
    ConfigError
        `hours` is not a number above 0.
    DataError
        There is no validation part, or `out` holds something else.
    TrainingError
        A default recipe failed, or several trials in a row.
    """
    if not 0 < hours < math.inf:
        raise ConfigError(f"The time of the search is {hours:g} hours. It must be a number above 0. Give --hours 2, for example.")
    check_names(config)
    dataset = Dataset.open(data)
    config = as_made(config, dataset)
    if not config.prepare.split.has_valid or not len(dataset.held_out("valid").queries):
        raise DataError(
            f"{data} has no validation part. A search compares its trials there. Prepare the data with prepare.split.valid above 0."
        )
    until = time.time() + min(hours, 1e6) * 3600
    search = Search(config, data, out, until, most_trials)
    study = TuningStudy.open(out, config, dataset)
    before = len(study.trials())
    if before:
        log.info("tune: continuing the study in %s, which has %s", out, counted(before, "trial"))
    try:
        if processes == 1:
            run_trials(search, study, dataset)
        else:
            _in_processes(search, study, processes)
    finally:
        result = result_of(study, dataset)
        write_result(result)
    return result


def run_trials(search: Search, study: TuningStudy, dataset: Dataset) -> None:
    """Train one trial after the other, until the time is over or there are enough."""
    while time.time() < search.until_s:
        with study.claim(search.most_trials) as trial:
            if trial is None:
                return
            _run(trial, search, study, dataset)
            number = trial.number
        log.info("tune: %s", result_of(study, dataset).progress(number, max(search.until_s - time.time(), 0.0)))
        last = [one for one in study.trials() if one.state.is_finished()][-MAX_FAILURES:]
        if len(last) == MAX_FAILURES and all(one.state == TrialState.FAIL for one in last):
            raise TrainingError(f"{MAX_FAILURES} trials in a row failed, the last one with: {last[-1].user_attrs['error']}")


def _run(trial: Trial, search: Search, study: TuningStudy, dataset: Dataset) -> None:
    """Train a trial, and note how it ended, unless the time is over: then it stays unfinished."""
    folder, began = study.folder(trial.number), time.perf_counter()
    spent = float(trial.user_attrs.get("seconds", 0.0))
    watcher = TrialWatcher(trial, search.until_s, prunes=RECIPE not in trial.user_attrs)
    try:
        config = study.config(trial)
        device = choose_device(config.training.device)
        with _quiet():
            resume = (folder / "last.pt").is_file()
            reached = fit_within(dataset, device, Watch(), config, folder, resume, 1.0, f"trial {trial.number}", [watcher])
        trial.set_user_attr("seconds", round(spent + time.perf_counter() - began, 2))
        trial.set_user_attr("steps", reached.step)
        if watcher.out_of_time:
            return
        if watcher.pruned:
            study.optuna.tell(trial, state=TrialState.PRUNED)
        else:
            values = validation_values(folder / "best.pt", dataset, device)
            np.save(folder / VALUES, values)
            watcher.report(EIGHTHS, float(values.mean()))
            study.optuna.tell(trial, float(values.mean()))
    except TwoTowerError as error:
        if RECIPE in trial.user_attrs:
            raise
        trial.set_user_attr("error", str(error))
        study.optuna.tell(trial, state=TrialState.FAIL)
    for checkpoint in folder.glob("*.pt"):
        checkpoint.unlink()


def validation_values(checkpoint: Path, dataset: Dataset, device: torch.device) -> Float64:
    """Return the deciding metric of a trained model for each query of the validation part, float64 [B]."""
    model, config, _ = load_trained(checkpoint, dataset)
    moment = split_moment(dataset, "valid")
    store = open_store(dataset, "valid", config.model)
    retriever = NeuralRetriever(model.to(device), store, n_item_rows=dataset.n_item_rows, time_s=moment)
    calibrate_new_items(retriever, dataset, time_s=moment, exposure=config.model.new_item_exposure, seed=config.seed)
    held_out = dataset.held_out("valid", max_queries=config.training.eval_queries, seed=config.seed)
    metric = config.training.eval_metric
    return evaluate(retriever, held_out, dataset, config.evaluation, metrics=[metric], beyond_k=None).values[:, 0]


class TrialWatcher(Callback):
    """Report the validations of a trial to the study, and stop it if it is far behind or the time is over.

    Attributes
    ----------
    pruned, out_of_time
        Why the training was stopped.
    """

    def __init__(self, trial: Trial, until_s: float, *, prunes: bool) -> None:
        self.trial, self.until_s, self.prunes = trial, until_s, prunes
        self.pruned = self.out_of_time = False
        self._best: float | None = None
        self._reported = max(trial.study.trials[trial.number].intermediate_values, default=0)

    def on_start(self, training: Training) -> None:
        """Remember the best value of a trial that is continued."""
        self._best = training.best

    def on_step(self, training: Training) -> None:
        """Stop at the end of the time; raise `KeyboardInterrupt` if the process that started this one is gone."""
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            raise KeyboardInterrupt
        if time.time() >= self.until_s and training.step < training.last_step:
            self.out_of_time = True
            training.stop()

    def on_validation(self, training: Training, metrics: Mapping[str, float]) -> None:  # noqa: ARG002
        """Report the best value at every eighth of the training that was passed, and ask whether to stop."""
        share = EIGHTHS * training.step / training.last_step
        slack = 1 / 16  # of an eighth: validations are at whole steps
        for eighth in range(self._reported + 1, math.floor(share + slack) + 1):
            value = training.best if eighth >= share - slack else self._best
            if value is not None:
                self.report(eighth, value)
        self._best = training.best
        if self.prunes and not self.out_of_time and training.step < training.last_step and self.trial.should_prune():
            self.pruned = True
            training.stop()

    def report(self, eighth: int, value: float) -> None:
        """Report the best value up to a share of the training, once."""
        if eighth > self._reported:
            self.trial.report(value, eighth)
            self._reported = eighth


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the log lines of a training out of those of the search."""
    level = log.level
    log.setLevel("ERROR")
    try:
        yield
    finally:
        log.setLevel(level)


# Several processes.


def _in_processes(search: Search, study: TuningStudy, processes: int) -> None:
    """Run trials in several processes, which log to files; show here which trials have ended."""
    dataset, context = Dataset.open(search.data), multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(search, number, processes)) for number in range(processes)]
    printed = {one.number for one in study.trials() if one.state.is_finished()}
    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers):
            time.sleep(POLL_S)
            for one in study.trials():
                if one.state.is_finished() and one.number not in printed:
                    printed.add(one.number)
                    left = max(search.until_s - time.time(), 0.0)
                    log.info("tune: %s", result_of(study, dataset).progress(one.number, left))
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
    for number, worker in enumerate(workers):
        if worker.exitcode:
            log_file = _log_file(search.out, number)
            raise TrainingError(f"Process {number} of the search failed: see {log_file}. Correct the cause and repeat the command.")


def _work(search: Search, number: int, processes: int) -> None:
    """Run trials in a process of its own."""
    with _log_file(search.out, number).open("a") as file:
        sys.stderr = file
        setup_logging()
        torch.set_num_threads(max(torch.get_num_threads() // processes, 1))
        dataset = Dataset.open(search.data)
        try:
            run_trials(search, TuningStudy.open(search.out, search.config, dataset), dataset)
        except TwoTowerError as error:
            log.error("%s", error)
            file.flush()
            sys.exit(2)


def _log_file(out: Path, number: int) -> Path:
    return out / f"process-{number}.log"

"""Go on with a run's training on new events, and publish the new model if it is not worse.

    run ─▶ extended dataset ─▶ training from the run's checkpoint ─▶ calibration ─▶ comparison ─▶ bundle ─▶ the run is exchanged

All of it happens in a folder beside the output, `.NAME.update`. The run is exchanged for it at the end, at once, so that a process
that is killed leaves the run as it was. The next call goes on with the folder it finds there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from twotower.bundle.bundle import DATASET, export_bundle, load_trained
from twotower.bundle.revision import take_over
from twotower.bundle.sealed_folder import MANIFEST
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import can_refresh, split_moment
from twotower.data.grown_dataset import grow
from twotower.data.growth import plan_growth
from twotower.data.new_rows import read_new_rows
from twotower.data.train_events import Replay
from twotower.errors import ConfigError, DataError, TrainingError, TwoTowerError
from twotower.evaluation.bootstrap import intervals, resample
from twotower.evaluation.report import read_report, write_report
from twotower.pipeline.calibrate import calibrate_run
from twotower.pipeline.new_data import NewSource
from twotower.pipeline.run_folder import dataset_reference, locked, run_dataset, run_manifest
from twotower.pipeline.stages import Watch, fit_within
from twotower.pipeline.update_verdict import Newest, worse_in_words
from twotower.schema import ITEM_ID, TRAIN, UNKNOWN
from twotower.trainers.grown_checkpoint import Start, grow_checkpoint
from twotower.trainers.optimizer import choose_device
from twotower.trainers.time_limit import TimeLimit
from twotower.trainers.training_state import TrainingState
from twotower.utils.atomic_files import atomic_file, replace_folder
from twotower.utils.checkpoint import load_checkpoint, save_checkpoint
from twotower.utils.config import ResolvedConfig, load_config, parse_config
from twotower.utils.console import log
from twotower.utils.documents import CalibrationRecord
from twotower.utils.manifests import BestValidation, RunManifest, UpdateRecord
from twotower.utils.run_parts import BEGIN, OF_A_RUN, REPORT, REPORT_BEFORE

RECORD = "update.json"
REPLACED = set(OF_A_RUN) - {REPORT_BEFORE}
"""What the updated run has of its own. Everything else in the folder is taken over."""
LEAST_QUERIES = 1000
"""Validation queries that are enough to fit the weights of the score again; fewer are, if the run itself had fewer."""
CLEARLY_BETTER = 0.9
"""Least share of the bootstrap resamples in which newly fitted weights of the score are better than those of the run."""


def update(
    run: Path, source: NewSource, out: Path, *, overrides: Sequence[str] = (), watch: Watch | None = None
) -> UpdateRecord | None:
    """Train a run on new data, and write dataset/, model/ and bundle/ to `out`, which may be the run itself.

    The run itself keeps the report of the model before in report_before_update/, without the lists of users.

    Parameters
    ----------
    run
        Folder of `twotower run`, `train` or `update`.
    overrides
        Settings "updating.NAME=value".

    Returns
    -------
    UpdateRecord
        None if the run has all of the events already; then nothing is written.

    Raises
    ------
    DataError
        The new data do not fit the run, or another update of `out` is running.
    TrainingError
        The new model is worse; then nothing is published.
    """
    run, out = run.resolve(), out.resolve()
    model = run if (run / MANIFEST).is_file() else run / "model"
    work = out.with_name(f".{out.name}.update")
    if out != run and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists already. An update writes to a new folder, or to the run itself. Choose another --out.")
    if out == run and out in (here := Path.cwd(), *here.parents):
        raise DataError(f"{here} is part of {run}, which is exchanged as a whole. Go to another folder, or choose an --out.")
    if run in out.parents:
        raise DataError(f"{out} is part of {run}, which is updated. Choose an --out outside of it.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError("An update runs in one process. Start it without torchrun.")
    with locked(out), nullcontext() if out == run else locked(run, shared=True):
        manifest = run_manifest(model)
        base, config = run_dataset(model, manifest), _settings(manifest, overrides)
        if not can_refresh(base):
            raise DataError(
                f"{run} is split by {base.manifest.config.prepare.split.kind}. An update needs a run whose events have times and "
                "are split by time (prepare.split.kind: time). Train such a run first."
            )
        try:
            return _update(run, model, source, out, work, (manifest, base, config), watch or Watch())
        except TwoTowerError:  # a process that ends otherwise, such as a killed one, leaves what it has done
            shutil.rmtree(work, ignore_errors=True)
            raise


def _update(
    run: Path,
    model: Path,
    source: NewSource,
    out: Path,
    work: Path,
    opened: tuple[RunManifest, Dataset, ResolvedConfig],
    watch: Watch,
) -> UpdateRecord | None:
    manifest, base, config = opened
    grown = _extended(base, source, config, out, work, _added_items(run, base))
    if grown is None:
        return None
    config = grow_checkpoint(model / "best.pt", base, grown, work / "model" / BEGIN, config)
    reached = _train(base, grown, config, work / "model", watch)
    begin = load_checkpoint(work / "model" / BEGIN)["model"]
    newest = Newest(grown, config)
    priors = {name.removeprefix("priors."): value for name, value in begin.items() if name.startswith("priors.")}
    calibration = _calibrate(newest, work / "model" / "best.pt", priors, manifest.calibration)
    record = _compare(base, newest, work / "model", manifest, reached)
    if record.worse_frac > config.updating.max_worse_frac:
        raise TrainingError(worse_in_words(record, run))
    best = _write_manifest(work / "model", out, grown, config, reached, record, calibration)
    export_bundle(work / "model" / "best.pt", grown, work / "bundle", metrics=best)
    if out == run:
        _keep_report(run, work)
    _carry_over(run, work)
    (work / RECORD).unlink()
    (work / "model" / BEGIN).unlink()
    replace_folder(work, out)
    _take_rest(work, out)
    shutil.rmtree(work, ignore_errors=True)
    return record


def _settings(manifest: RunManifest, overrides: Sequence[str]) -> ResolvedConfig:
    """Return the settings of the run, with overrides of the section `updating`."""
    for override in overrides:
        if not override.startswith("updating."):
            raise ConfigError(f"{override!r} cannot change in an update. Only updating.* settings can. Train again to change it.")
    wanted = load_config(None, list(overrides)).updating.model_dump(exclude_unset=True)
    values = manifest.config.model_dump(mode="json")
    values["training"]["memory_budget_gb"] = None  # what fitted it is settled; a new plan could change how tables are stored
    return parse_config({**values, "updating": {**values["updating"], **wanted}}, ResolvedConfig)


def _extended(
    base: Dataset, source: NewSource, config: ResolvedConfig, out: Path, work: Path, added: pa.Table | None
) -> Dataset | None:
    """Return the dataset with the new rows: that of an interrupted update, or a new one; None without a new event."""
    wanted = {"data": base.fingerprint, "source": list(source.identity), "updating": config.updating.model_dump(mode="json")}
    if source.identity and _read(work / RECORD) == wanted:
        log.info("resuming the update in %s", work)
        for left in [*work.glob(".*.new"), *work.glob(".*.old")]:
            shutil.rmtree(left, ignore_errors=True)
        return Dataset.open(work / "dataset")
    _take_rest(work, out)  # of an update that was killed after the exchange
    shutil.rmtree(work, ignore_errors=True)
    rows = read_new_rows(source.data, base, source.what, source.tables, added)
    growth = plan_growth(base, rows, valid_frac=config.updating.valid_frac)
    if growth is None:
        return None
    work.mkdir(parents=True)
    grown = grow(base, rows, growth, work / "dataset")
    with atomic_file(work / RECORD) as beside:
        beside.write_text(json.dumps(wanted, indent=1))
    return grown


def _read(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _train(base: Dataset, grown: Dataset, config: ResolvedConfig, out: Path, watch: Watch) -> TrainingState:
    fresh = grown.events.time_s >= split_moment(base, "valid")
    if not (fresh & (grown.events.split == TRAIN) & grown.events.positive).any():
        raise DataError(
            "There are too few new events: all of them validate, and none is left to train on. Nothing was changed. Give more "
            "events, or lower updating.valid_frac."
        )
    start = Start(out / BEGIN, Replay(split_moment(base, "valid"), config.updating.replay_frac))
    resume, device = (out / "last.pt").is_file(), choose_device(config.training.device)
    called = [TimeLimit(config.training.max_hours), *watch.callbacks]
    return fit_within(grown, device, watch, config, out, resume, 1.0, "update", called, start)


def _calibrate(
    newest: Newest, checkpoint: Path, priors: dict[str, Tensor], last: CalibrationRecord | None
) -> CalibrationRecord | None:
    """Fit the weights of the score again, and take them if they are clearly better than those of the run."""
    grown, config, queries = newest.dataset, newest.config, newest.held_out.queries
    calibrate_run(config, grown, checkpoint, priors=priors, fit=False)
    if len(queries) < min(LEAST_QUERIES, last.queries if last else LEAST_QUERIES):
        log.info("the weights of the score stay as they are: %d validation queries are too few to fit them", len(queries))
        return last
    kept, before = load_checkpoint(checkpoint), newest.values(load_trained(checkpoint, grown)[0], grown)
    found = calibrate_run(config, grown, checkpoint, priors=priors)
    gained = newest.values(load_trained(checkpoint, grown)[0], grown) - before
    draws = resample(gained[:, None], queries.user_row, config.evaluation.bootstrap_resamples, config.seed)
    if (better := float((draws > 0).mean())) >= CLEARLY_BETTER:
        return found
    log.info("the weights of the score stay as they are: the fitted ones are better in only %.0f%% of the resamples", 100 * better)
    save_checkpoint(checkpoint, kept)
    return last


def _compare(base: Dataset, newest: Newest, model: Path, manifest: RunManifest, reached: TrainingState) -> UpdateRecord:
    """Compare the new model with the one before, both with refreshed items, on the newest events."""
    grown, config, queries = newest.dataset, newest.config, newest.held_out.queries
    before_known = grown.known_to(base.n_train_items, base.n_train_users)
    pairs = (BEGIN, before_known), ("best.pt", grown)
    values = [newest.values(load_trained(model / name, grown)[0], known) for name, known in pairs]
    table = np.stack([*values, values[1] - values[0]], axis=1)
    draws = resample(table, queries.user_row, config.evaluation.bootstrap_resamples, config.seed)
    before, after, difference = intervals(["before", "after", "difference"], table.mean(axis=0), draws).values()
    return UpdateRecord(
        number=1 if manifest.update is None else manifest.update.number + 1,
        data=base.fingerprint,
        new_events=len(grown.item_events) - len(base.item_events),
        new_users=grown.n_users - base.n_users,
        new_items=grown.n_items - base.n_items,
        metric=config.training.eval_metric,
        before=before.value,
        after=after.value,
        difference=difference,
        worse_frac=float((draws[:, 2] < 0).mean()),
        queries=len(queries),
        steps=reached.step,
    )


def _write_manifest(
    model: Path,
    out: Path,
    grown: Dataset,
    config: ResolvedConfig,
    reached: TrainingState,
    record: UpdateRecord,
    calibration: CalibrationRecord | None,
) -> BestValidation:
    """Write the manifest of the run, with the folder that the dataset will have."""
    best = BestValidation(metric=record.metric, value=reached.best, step=reached.best_step, total_steps=reached.total_steps)
    manifest = RunManifest(
        seed=config.seed,
        dataset=dataset_reference(out / DATASET, out / "model"),
        data=grown.fingerprint,
        config=config,
        best=best,
        recipe=None,
        calibration=calibration,
        refit=None,
        update=record,
    )
    (model / MANIFEST).write_text(json.dumps(manifest.json_values(), indent=1, sort_keys=True))
    return best


def _keep_report(run: Path, work: Path) -> None:
    """Keep the report of the model before, in a folder of its own: it does not describe the new model.

    It loses the lists of its users, or `forget` would have to look for them there.
    """
    found = [folder / REPORT for folder in (run, run / "model") if (folder / REPORT).is_file()]
    if not found:
        return
    try:
        report = read_report(found[0])
    except DataError as error:
        log.warning("the report of the model before is not kept: %s", error)
        return
    write_report(report.model_copy(update={"examples": []}), work / REPORT_BEFORE)


def _carry_over(run: Path, work: Path) -> None:
    """Take over what belongs to the served bundle alone, and what else lies in the folder of the run.

    The files are the same ones, not copies: a server may write to its event store there.
    """
    if (run / "bundle" / MANIFEST).is_file():
        take_over(work / "bundle", run / "bundle")
    for child in run.iterdir():
        if child.name not in REPLACED and not (work / child.name).exists():
            if child.is_dir():
                shutil.copytree(child, work / child.name, copy_function=_linked)
            else:
                _linked(child, work / child.name)


def _linked(source: Path | str, target: Path | str) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no links
        shutil.copy2(source, target)


def _take_rest(old: Path, out: Path) -> None:
    """Move what came into the folder of the run after `_carry_over`, such as the log of an event store."""
    for child in old.iterdir() if old.is_dir() else ():
        if child.name not in REPLACED and not (out / child.name).exists():
            child.rename(out / child.name)


def _added_items(run: Path, base: Dataset) -> pa.Table | None:
    """Return the items that were added to the bundle of the run, and that the run itself lacks."""
    if not (run / "bundle" / MANIFEST).is_file():
        return None
    items = Dataset.open(run / "bundle" / DATASET).items
    added = items.filter(pa.array(base.item_rows(items[ITEM_ID].to_pylist()) == UNKNOWN))
    return added if len(added) else None

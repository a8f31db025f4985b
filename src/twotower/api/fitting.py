"""Fit a model on frames, with the stages of the command line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any
from weakref import finalize

from twotower.api.fitted import Fitted
from twotower.api.roles import EVENTS, ITEMS, USERS, describe_frames, named_columns, named_frames, tables_of
from twotower.errors import DataError
from twotower.pipeline.new_data import source_of_tables
from twotower.pipeline.run_folder import run_dataset
from twotower.pipeline.stages import Watch, run_all
from twotower.pipeline.update import update
from twotower.trainers.callbacks import Callback, Training
from twotower.utils.config import Config, merged
from twotower.utils.console import Bar, log, setup_logging
from twotower.utils.frames import kind_of
from twotower.utils.run_parts import OF_A_RUN


@dataclass(frozen=True)
class Options:
    """Options of a fit: output folder, verbosity, callbacks.

    Attributes
    ----------
    folder
        Folder that is kept; None: a temporary one.
    """

    folder: Path | None
    overwrite: bool
    callbacks: tuple[Callback, ...]
    verbose: int


def fit_frames(
    configure: Callable[[dict[str, Any] | None], Config],
    frames: tuple[Any, Any, Any],
    roles: Mapping[str, str | None],
    options: Options,
) -> Fitted:
    """Prepare, train and evaluate; see `Model.fit`.

    Parameters
    ----------
    configure
        Returns all settings, with the section `data` that it gets.
    """
    named = named_columns(roles)
    given = configure(None).data.model_dump(mode="json", exclude_unset=True)
    for section in ("interactions", ITEMS, USERS):  # a path that stands for a frame
        if isinstance(given.get(section), dict):
            given[section].pop("path", None)
    described = describe_frames(named_frames(*frames), named, given)
    settings = configure(described.data)
    timed = settings.data.interactions is not None and settings.data.interactions.time is not None
    if not timed and "kind" not in settings.prepare.split.model_fields_set:  # without times there is no cut in time
        prepare = merged(settings.prepare.model_dump(exclude_unset=True), {"split": {"kind": "leave_one_out"}})
        settings = settings.model_copy(update={"prepare": type(settings.prepare).model_validate(prepare)})
    if options.folder is not None and options.folder.exists() and not options.folder.is_dir():
        raise DataError(f"{options.folder} is a file. folder must be a folder, or be left out. Choose another one.")
    out = options.folder or Path(mkdtemp(prefix="twotower-"))
    found = [name for name in OF_A_RUN if (out / name).exists()]
    if found and not options.overwrite:
        raise DataError(f"{out} already contains {', '.join(found)}. Choose another folder, or pass overwrite=True.")
    with _progress(options.verbose) as callbacks:
        watch = Watch(callbacks=[*options.callbacks, *callbacks], interruptible=True)
        evaluated = _run(settings, out, described.tables, watch)
    made = Fitted(out / "bundle", out, out / "report.json" if evaluated else None, kind_of(frames[0]))
    if options.folder is None:
        made.temporary = finalize(made, rmtree, out, ignore_errors=True)
    return made


def update_frames(made: Fitted, frames: tuple[Any, Any, Any], overrides: Mapping[str, Any], options: Options) -> Fitted:
    """Train a fitted model on further frames, in its folder; see `Model.update`."""
    if made.folder is None:
        raise DataError("The model has no folder with its training. Open a run with twotower.load(run), or fit the model anew.")
    run = made.folder
    base = run_dataset(run / "model" if (run / "model").is_dir() else run)
    given = named_frames(*frames)
    settings = base.manifest.config.data.model_dump(mode="json")
    tables = tables_of(given, settings)
    if not tables[EVENTS].num_rows:
        raise DataError("events has no rows. Pass a frame with at least one.")
    source = source_of_tables(tables, base)
    changed = [f"updating.{name}={value}" for name, value in overrides.items()]
    with _progress(options.verbose) as callbacks:
        record = update(run, source, run, overrides=changed, watch=Watch(callbacks=[*options.callbacks, *callbacks]))
    if record is None:
        log.warning("there are no new events: nothing was changed")
        return made
    fresh = Fitted(run / "bundle", run, None, made.kind)
    if made.temporary is not None:
        made.temporary.detach()
        fresh.temporary = finalize(fresh, rmtree, run, ignore_errors=True)
    return fresh


def _run(settings: Any, out: Path, tables: dict[str, Any], watch: Watch) -> bool:
    """Run the stages. Return whether the model was evaluated; Ctrl-C after the training leaves it without a report."""
    try:
        return run_all(settings, out, tables=tables, watch=watch) is not None
    except KeyboardInterrupt:
        if not (out / "bundle" / "manifest.json").is_file() or not (out / "model" / "manifest.json").is_file():
            raise
        log.warning("interrupted: the model is not evaluated")
        return False


class _Figures(Callback):
    """Show validation metrics beside the progress bar."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar

    def on_validation(self, training: Training, metrics: Mapping[str, float]) -> None:
        """See `Callback`."""
        metric = training.config.training.eval_metric
        self.bar.figures({"train_loss": metrics["train_loss"], metric: metrics[metric]})


@contextmanager
def _progress(verbose: int) -> Iterator[list[Callback]]:
    """Show a progress bar from 1 on, the log lines from 2 on, and warnings in any case."""
    level, handlers, propagate = log.level, log.handlers, log.propagate
    try:
        if verbose > 1:
            setup_logging()
        else:
            log.setLevel(logging.WARNING)
        if verbose:
            with Bar() as bar:
                yield [_Figures(bar)]
        else:
            yield []
    finally:
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)

"""Define `Model`: fit from DataFrames, recommend, save. It runs the stages of the command line on tables in memory.

Examples
--------
>>> Model(seed=1, training={"max_steps": 20})
Model(seed=1, training={'max_steps': 20})
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.api.params import Params, Section, check_callbacks, path_of
from twotower.errors import ConfigError, DataError, NotFittedError, TwoTowerError
from twotower.utils.config import Config

if TYPE_CHECKING:
    import numpy as np

    from twotower.api.fitted import Fitted
    from twotower.api.report import Report
    from twotower.data.dataset import Dataset
    from twotower.retrieval.recommender import FilterSpec, Recommender
    from twotower.trainers.callbacks import Callback
    from twotower.utils.ids import Id
    from twotower.utils.types import Float


class Model(Params):
    """A two-tower recommender: settings in the constructor, data in `fit`.

    Parameters
    ----------
    seed
        Random seed. None: that of `config`, else 0.
    config
        Settings as a YAML file, a dict or a `Config`; the other arguments override them.
    data, prepare, model, training, evaluation, updating
        Sections of the settings, as dicts: `training={"num_epochs": 4}`.
    callbacks
        Objects with `on_step`, `on_validation` and so on; see `Callback`.
    verbose
        0: warnings only; 1: a progress bar; 2: the log lines too.

    Raises
    ------
    ConfigError
        A setting is unknown or invalid.

    Examples
    --------
    >>> Model(training={"num_epochs": 2}).get_params()["training"]
    {'num_epochs': 2}
    """

    def __init__(
        self,
        seed: int | None = None,
        *,
        config: Path | str | Config | Section | None = None,
        data: Section | None = None,
        prepare: Section | None = None,
        model: Section | None = None,
        training: Section | None = None,
        evaluation: Section | None = None,
        updating: Section | None = None,
        callbacks: Sequence[Callback] = (),
        verbose: int = 1,
    ) -> None:
        self.seed, self.config, self.callbacks, self.verbose = seed, config, callbacks, verbose
        self.data, self.prepare, self.model, self.training = data, prepare, model, training
        self.evaluation, self.updating = evaluation, updating
        self._fitted: Fitted | None = None
        check_callbacks(callbacks)
        if not isinstance(verbose, int) or verbose not in (0, 1, 2):
            raise ConfigError(f"verbose is {verbose!r}. It must be 0, 1 or 2.")
        self.settings()

    # Fitting.

    def fit(
        self,
        events: Any,
        items: Any = None,
        users: Any = None,
        *,
        user: str | None = None,
        item: str | None = None,
        time: str | None = None,
        rating: str | None = None,
        event_type: str | None = None,
        text: str | None = None,
        name: str | None = None,
        folder: Path | str | None = None,
        overwrite: bool = False,
    ) -> Model:
        """Prepare, train and evaluate on frames. A second call is a new fit.

        Parameters
        ----------
        events
            A row per event: a pandas or polars DataFrame, an Arrow table, a DuckDB relation or a dict of columns.
        items, users
            Frames with a row per item or user. Their columns become features and filters.
        user, item, time, rating, event_type, text
            Columns of `events`. None: guessed, see `describe`. Without a time, the order of the rows counts.
        name
            Column of `items` with the display name.
        folder
            Folder that keeps dataset, checkpoints, bundle and report. None: a temporary one, removed with the model.
        overwrite
            Replace an earlier fit in `folder`.

        Returns
        -------
        Model
            Itself. After Ctrl-C during the training it is the best model so far, without a report.

        Raises
        ------
        DataError
            A frame lacks a column, is empty, or cannot be read.
        TrainingError
            There are too few events to train or validate.
        """
        from twotower.api.fitting import Options, fit_frames

        roles = {"user": user, "item": item, "time": time, "rating": rating, "event_type": event_type, "text": text, "name": name}
        self._fitted = None
        options = Options(None if folder is None else path_of(folder, "folder"), overwrite, tuple(self.callbacks), self.verbose)
        self._fitted = fit_frames(self.settings, (events, items, users), roles, options)
        return self

    def update(self, events: Any, items: Any = None, users: Any = None) -> Model:
        """Go on with the training on new events, as `twotower update` does. The model changes if it does not become worse.

        Parameters
        ----------
        events
            New events, in the columns of `fit`. Events that the model has do not count again.
        items, users
            Frames in the columns of `fit`: new rows, and new values of known ones. Items: the whole catalogue, or only new ones.

        Returns
        -------
        Model
            Itself, without a report: all events are trained on or validate.

        Raises
        ------
        DataError
            A frame lacks a column or does not fit the model, its events are older, or the model was opened without its training.
        TrainingError
            The new model is worse on the newest events. Then this one stays as it is.
        """
        from twotower.api.fitting import Options, update_frames

        options = Options(self._made.folder, True, tuple(self.callbacks), self.verbose)
        self._fitted = update_frames(self._made, (events, items, users), dict(self.updating or {}), options)
        return self

    # Answers.

    def recommend(
        self,
        users: Any = None,
        *,
        history: Any = None,
        k: int = 10,
        filter: FilterSpec = None,
        strict: bool = False,
        near: tuple[float, float] | None = None,
        exclude_seen: bool = True,
        diversity: float = 0.0,
        popularity_bias: float = 0.0,
        explain: bool = False,
    ) -> Any:
        """Return the best items for users, or for histories of users that the model does not know.

        Parameters
        ----------
        users
            One id, a list, a Series or an array of ids, or a frame of histories: a row per event, with the columns of users and
            items that `fit` had, oldest first or with the time column. Ids may be integers or their texts. A frame's histories
            replace those that the model knows.
        history
            Item ids, oldest first; or a list of such lists. With one user, the events are added to those of the user.
        k
            Items per list. Fewer come only if fewer match.
        filter
            Condition on the items: 'brand == "Uji" and price <= 20'.
        strict
            True: unknown users, and unknown items in a frame, raise. False: unknown users get recently popular items, which the
            column "source" shows, and unknown items are left out.
        near, exclude_seen, diversity, popularity_bias, explain
            See `Request`.

        Returns
        -------
        frame
            "user" (the id; "history", a position, for a list of histories; neither for one history), "rank" from 1, "item", "name",
            "score", "source", and "distance_km" and "reasons" where there are any. The library is that of the frame or Series in
            `users`, else that of the frames in `fit`.

        Raises
        ------
        RequestError
            Neither users nor a history is given, an id is missing, an item is unknown, or the filter is malformed.
        """
        from twotower.api.answering import recommend

        same = {
            "near": near,
            "exclude_seen": exclude_seen,
            "diversity": diversity,
            "popularity_bias": popularity_bias,
            "explain": explain,
        }
        return recommend(self._made, users, history, strict=strict, k=k, filter=filter, **same)

    def similar(self, item: Id, k: int = 10, *, filter: FilterSpec = None) -> Any:
        """Return the items with the vectors most similar to that of an item, as a frame: "rank", "item", "name", "score".

        Raises
        ------
        RequestError
            The item is unknown, or the filter is malformed.
        """
        from twotower.api.answering import similar

        return similar(self._made, item, k, filter)

    def item_vectors(self) -> tuple[np.ndarray, Float]:
        """Return the ids of all items [N] and their vectors float32 [N, D].

        The last numbers of a vector are not from the tower: log popularities of the item, and its location. The inner product of a
        user vector and an item vector is the score of `recommend`, without the bonus of items that came after or before the last
        items of the history.
        """
        from twotower.api.answering import item_vectors

        return item_vectors(self._made)

    def user_vectors(self, users: Any = None, *, history: Any = None) -> tuple[np.ndarray, Float]:
        """Return ids (positions for histories) [B] and user vectors float32 [B, D], for users or histories as in `recommend`.

        `users=None` without a history stands for all users of the events.
        """
        from twotower.api.answering import user_vectors

        return user_vectors(self._made, users, history)

    # Results.

    @property
    def report(self) -> Report:
        """The evaluation on the test part. A notebook shows it as a page; see `Report`.

        Raises
        ------
        DataError
            Nothing was evaluated: there is no test part, or Ctrl-C ended the fit.
        """
        from twotower.api.report import Report

        made = self._made
        if made.report is None:
            raise DataError("The model has no report: nothing was evaluated. Fit with a test part (prepare.split.test above 0).")
        return Report(made.report, made.kind)

    @property
    def recommender(self) -> Recommender:
        """The opened bundle, with one request at a time and all their options."""
        return self._made.recommender

    @property
    def dataset(self) -> Dataset:
        """The prepared dataset."""
        return self._made.recommender.dataset

    @property
    def folder(self) -> Path | None:
        """The folder of the fit, with dataset, checkpoints, bundle and report; None for a model that was opened."""
        return self._made.folder

    def save(self, path: Path | str) -> Path:
        """Write the model to a folder, which `twotower.load` opens and `twotower serve` serves. Return its path.

        Raises
        ------
        DataError
            `path` exists and is neither empty nor a saved model, or it cannot be written.
        """
        from twotower.api.fitted import save

        return save(self._made, path_of(path, "The path"))

    @property
    def _made(self) -> Fitted:
        if self._fitted is None:
            raise NotFittedError("The model is not fitted. Call fit(...) first, or open a saved model with twotower.load(path).")
        return self._fitted

    def __getstate__(self) -> dict[str, Any]:
        if self._fitted is not None:
            raise TwoTowerError("A fitted Model cannot be pickled: it is a folder. Use model.save(path), and twotower.load(path).")
        return self.__dict__

    def __repr__(self) -> str:
        given = {name: value for name, value in self.get_params(deep=False).items() if value not in (None, (), 1) or name == "seed"}
        arguments = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
        return f"Model({arguments}){': ' + self._summary() if self._fitted else ''}"

    def _summary(self) -> str:
        size, report = self.dataset.size, self._made.report
        return f"{size}. {report.verdict}" if report else f"{size}. Not evaluated."

    def _repr_html_(self) -> str:
        if not self._fitted:
            return f"<code>{escape(repr(self))}</code> <i>not fitted</i>"
        return f"<b>Two-tower model</b><br>{escape(self._summary())}"


def load(path: Path | str) -> Model:
    """Open a saved model, or the bundle or run of the command line.

    Parameters
    ----------
    path
        Folder of `Model.save`, `Model.fit(folder=)`, `twotower export`, `twotower train` or `twotower run`.

    Returns
    -------
    Model
        A model that answers as the fitted one does.

    Raises
    ------
    DataError
        There is no bundle, or its files are not as they were written.
    """
    from twotower.api.fitted import open_bundle

    model = Model()
    model._fitted = open_bundle(path_of(path, "The path"))
    return model

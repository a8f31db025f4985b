"""Send what a training logs to TensorBoard, MLflow or Weights & Biases: callbacks for `twotower.Model(callbacks=[…])`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from twotower.errors import ConfigError, require
from twotower.trainers.callbacks import Callback, Training
from twotower.trainers.run_files import disk_errors_as_training_errors

MAX_VALUE_CHARS = 500  # of a parameter in MLflow


class TensorBoardLogger(Callback):
    """Write scalars for TensorBoard. Every training has one, which writes to `tensorboard/` in the folder of the run.

    Parameters
    ----------
    folder
        Folder of the files; what it holds is replaced. None: `tensorboard/` in the folder of the run.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        if folder is not None and not isinstance(folder, str | os.PathLike):
            raise ConfigError(f"The folder of TensorBoardLogger is {folder!r}. It must be a path, such as 'board'.")
        self.folder = None if folder is None else Path(folder)
        self._writer: SummaryWriter | None = None

    def on_start(self, training: Training) -> None:
        """See `Callback`."""
        folder = self.folder or training.folder / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        with disk_errors_as_training_errors(folder):
            self._writer = SummaryWriter(str(folder))
        for step, figures in training.logged():
            self._write(step, figures)

    def on_log(self, training: Training, figures: Mapping[str, float]) -> None:
        """See `Callback`."""
        self._write(training.step, figures)

    def on_end(self, training: Training) -> None:  # noqa: ARG002
        """See `Callback`."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()

    def _write(self, step: int, figures: Mapping[str, float]) -> None:
        with suppress(OSError):  # duplicates `metrics.jsonl`, whose writer reports a full disk
            for name, value in figures.items():
                if self._writer is not None:
                    self._writer.add_scalar(name, value, step)


class MLflowLogger(Callback):
    """Log settings and metrics as one MLflow run (extra `mlflow`).

    Parameters
    ----------
    tracking_uri
        Storage of the runs: a folder such as "mlruns", "sqlite:///mlflow.db" or the address of a server. None: MLflow's setting.
    experiment, run_name
        Names of the experiment and of the run; None: chosen by MLflow.
    """

    def __init__(
        self, tracking_uri: Path | str | None = None, *, experiment: str = "twotower", run_name: str | None = None
    ) -> None:
        require("mlflow", "mlflow")
        if tracking_uri is not None and not isinstance(tracking_uri, str | os.PathLike):
            raise ConfigError(f"tracking_uri is {tracking_uri!r}. It must be a folder such as 'mlruns', or an address.")
        tracking_uri = None if tracking_uri is None else str(tracking_uri)
        if tracking_uri is not None and (tracking_uri.startswith("file:") or ":" not in tracking_uri):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 asks for it
        self.tracking_uri, self.experiment, self.run_name = tracking_uri, experiment, run_name
        self.run_id: str | None = None
        self._client: Any = None

    def on_start(self, training: Training) -> None:
        """See `Callback`."""
        from mlflow.tracking import MlflowClient

        with disk_errors_as_training_errors(Path(self.tracking_uri or "mlruns")):
            self._client = client = MlflowClient(self.tracking_uri)
        with disk_errors_as_training_errors(Path(self.tracking_uri or "mlruns")):
            found = client.get_experiment_by_name(self.experiment)
            experiment = found.experiment_id if found else client.create_experiment(self.experiment)
            self.run_id = run_id = client.create_run(experiment, run_name=self.run_name).info.run_id
        for name, value in flat(training.config.model_dump(mode="json")).items():
            client.log_param(run_id, name, str(value)[:MAX_VALUE_CHARS])
        for step, figures in training.logged():
            self._write(step, figures)

    def on_log(self, training: Training, figures: Mapping[str, float]) -> None:
        """See `Callback`."""
        self._write(training.step, figures)

    def on_end(self, training: Training) -> None:  # noqa: ARG002
        """See `Callback`."""
        if self.run_id is not None:
            self._client.set_terminated(self.run_id)

    def _write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._client.log_metric(self.run_id, name.replace("@", "_at_"), value, step=step)  # MLflow refuses "@"


class WandbLogger(Callback):
    """Log settings and metrics to Weights & Biases (extra `wandb`).

    Parameters
    ----------
    project
        Name of the project.
    settings
        Further arguments of `wandb.init`, such as `mode="offline"`, `dir` or `name`.
    """

    def __init__(self, project: str = "twotower", **settings: Any) -> None:
        require("wandb", "wandb")
        self.project, self.settings = project, settings
        self._run: Any = None

    def on_start(self, training: Training) -> None:
        """See `Callback`."""
        import wandb

        self._run = wandb.init(project=self.project, config=flat(training.config.model_dump(mode="json")), **self.settings)
        for step, figures in training.logged():
            self._run.log(figures, step=step)

    def on_log(self, training: Training, figures: Mapping[str, float]) -> None:
        """See `Callback`."""
        self._run.log(dict(figures), step=training.step)

    def on_end(self, training: Training) -> None:  # noqa: ARG002
        """See `Callback`."""
        if self._run is not None:
            self._run.finish()


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name.

    Examples
    --------
    >>> flat({"training": {"batch_size": 512}})
    {'training.batch_size': 512}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return found

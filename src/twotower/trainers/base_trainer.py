"""Run the training loop: steps, precision, schedule, validation, early stopping, checkpoints and logs, in one or more processes.

A subclass computes the gradients of a batch and validates; `fit` runs the loop. A step never waits for the device: losses, norms
and error flags stay there until a log line, a validation or a checkpoint reads them. With several processes, the first one writes
files and logs. All processes hold the same weights, except for tables updated by rows, which they share.

Files in the run's folder: `last.pt` (to resume), `best.pt` (best validation so far; the last model without validation),
`metrics.jsonl` (one JSON object per log line or validation). Callbacks see the training at every step and may stop it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twotower.errors import TrainingError
from twotower.models.layers.tables import RowTable
from twotower.trainers.callbacks import Callback, Dispatcher, Training
from twotower.trainers.optimizer import Losses, LossScale, choose_device, choose_precision, clipped_step, make_optimizer
from twotower.trainers.run_files import CHANGEABLE_ON_RESUME, RunLog, config_diff
from twotower.trainers.schedule import Schedule
from twotower.trainers.training_state import TrainingState
from twotower.utils import distributed
from twotower.utils.checkpoint import load_checkpoint, save_checkpoint
from twotower.utils.config import Config
from twotower.utils.console import Report, log, progress, silent


class BaseTrainer:
    """Train `model` with the settings `config.training`, and write to `out`.

    Parameters
    ----------
    model
        Model with fresh weights; it is moved to the device.
    out
        Folder of the run.
    data
        Fingerprint of the dataset; a resumed run must have the same.

    Attributes
    ----------
    label
        Name of the progress bar.
    callbacks
        Called by the first process.
    interruptible
        True: Ctrl-C ends the training as `Training.stop` does. False: it raises `KeyboardInterrupt`.
    training
        State of the training that callbacks read.
    """

    def __init__(self, model: nn.Module, config: Config, out: Path, *, data: str) -> None:
        self.schedule = self.make_schedule(config)
        self.settings = config.training.model_copy(update={"num_epochs": config.training.num_epochs or self.schedule.epochs})
        self.config, self.out, self.data = config.model_copy(update={"training": self.settings}), out, data
        self.device = choose_device(self.settings.device)
        self.precision = choose_precision(self.settings.precision, self.device)
        self.model = model.to(self.device)
        self.optimizer = make_optimizer(self.model, self.settings.learning_rate, self.settings.weight_decay)
        self.tables = {name: part for name, part in self.model.named_modules() if isinstance(part, RowTable)}
        self.scaler = LossScale(self.device, enabled=self.precision is torch.float16)
        self.state = TrainingState()
        self.losses = Losses(self.device)  # since the last validation
        self._clock = self._saved = time.perf_counter()
        self._clock_examples = 0
        self._bar: Report = silent
        self.label = "train"
        self.callbacks: list[Callback] = []
        self.interruptible = False
        self.training = Training(self.config, out, self.model, self.schedule.last_step, self.schedule.steps_per_epoch)
        self._dispatch = Dispatcher([], self.training, self.state)
        self.log = RunLog(out)

    # Implemented by subclasses.

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        """Yield the batches of an epoch from batch `start`."""
        raise NotImplementedError

    def batches_per_epoch(self) -> int:
        """Return the number of batches in an epoch."""
        raise NotImplementedError

    def backward(self, batch: Any, scale: Tensor) -> tuple[Tensor, int]:
        """Add the gradients of `scale` times this process's part of the mean loss. Return the mean loss over all processes, a
        float64 scalar on the device, and the number of examples."""
        raise NotImplementedError

    def validate(self) -> dict[str, float] | None:
        """Return metrics on the validation part, `config.training.eval_metric` among them; None without a validation part."""
        raise NotImplementedError

    def make_schedule(self, config: Config) -> Schedule:
        """Return the steps of the training."""
        return Schedule.of(config.training, self.batches_per_epoch())

    def begin(self) -> None:
        """Prepare for the first step. Called after a resumed run has restored its state."""

    def after_step(self) -> None:
        """Run after every update of the weights."""

    # Training loop.

    def fit(self, *, resume: bool = False, stop_frac: float = 1.0) -> TrainingState:
        """Train until the last step or until the metric stops improving, and write `best.pt` and `last.pt`.

        Parameters
        ----------
        resume
            Continue from `last.pt`.
        stop_frac
            Share of the steps after which training pauses, above 0 and at most 1. The learning rate follows the full schedule.
            A validation that only the pause causes changes nothing but `state.reached`, so the pause does not change the model.

        Raises
        ------
        TrainingError
            The loss is not finite, or `resume` finds no usable checkpoint.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self.schedule = self.schedule.until(stop_frac)
        if resume:
            self._load()
        self.state.total_steps = self.schedule.total_steps
        self._clock = self._saved = time.perf_counter()
        self._clock_examples = self.state.examples
        self.log.start(self.state.step)
        self.begin()
        log.info(
            "training on %s in %s: %d steps of about %d examples%s",
            self.device,
            str(self.precision).removeprefix("torch."),
            self.schedule.last_step,
            self.settings.batch_size,
            f", {distributed.world_size()} processes" if distributed.world_size() > 1 else "",
        )
        self.training = Training(self.config, self.out, self.model, self.schedule.last_step, self.schedule.steps_per_epoch)
        self._dispatch = Dispatcher(self.callbacks, self.training, self.state)
        with progress() as self._bar, self._dispatch:
            try:
                self._loop()
            except KeyboardInterrupt:
                if not self.interruptible:
                    raise
                log.warning("interrupted at step %d: the best model so far is kept", self.state.step)
                self.training.stopped = self.training.interrupted = True
            paused = self.state.reached is not None and self.schedule.last_step < self.schedule.total_steps
            unsaved = self.state.best_step == 0 and not paused
            if unsaved or (self.training.stopped and self.losses.count and not self.training.interrupted):
                self._validate()
        if not self.training.interrupted:  # an interruption may be in the middle of a step
            self._save("last.pt")
        log.info(self.state.summary(self.settings.eval_metric))
        return self.state

    def _loop(self) -> None:
        """Train until the last step, until the metric stops improving, or until a callback stops the training."""
        while self.state.step < self.schedule.last_step and not self._done():
            for batch in self.batches(self.state.epoch, self.state.step_in_epoch):
                self._step(batch)
                if self.schedule.validates(self.state.step) or self.state.step == self.schedule.last_step:
                    self._validate()
                elif self._due():
                    self._save("last.pt")
                if self.state.step >= self.schedule.last_step or self._done():
                    break
            else:
                self.state.epoch, self.state.step_in_epoch = self.state.epoch + 1, 0

    def _step(self, batch: Any) -> None:
        self.model.train()
        rate = self.schedule.rate(self.state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not torch.float32):
            loss, examples = self.backward(batch.to(self.device), self.scaler.scale)
        self.losses.add(loss, self.state.step + 1)
        norm = self._update(rate)
        at = self.state
        at.step, at.step_in_epoch, at.examples = at.step + 1, at.step_in_epoch + 1, at.examples + examples
        self._bar(self.label, at.step, self.schedule.last_step)
        if at.step % self.settings.log_every == 0:
            summary, length = self.check(loss, norm)
            self._log({"loss": summary, "learning_rate": rate, "grad_norm": length, **self._speed()})
        self._dispatch("on_step")

    def check(self, *values: Tensor) -> list[float]:
        """Read scalars from the device in one transfer, and check that training can continue.

        Raises
        ------
        TrainingError
            A loss or gradient was not finite, and the loss scale cannot be lowered further. The weights are unchanged.
        """
        on_device = (*values, self.losses.failed, self.scaler.exhausted)
        *summary, failed, exhausted = torch.stack([value.double() for value in on_device]).tolist()
        wrong = f"The loss at step {failed:.0f} is not finite."
        if exhausted:
            step = self.state.step + 1
            wrong = f"The gradients overflowed before step {step}, and the loss scale is already at its minimum."
        if failed or exhausted:
            raise TrainingError(
                f"{wrong} Lower training.learning_rate, or use training.precision: fp32. The last checkpoint is in {self.out}."
            )
        return summary

    def _update(self, rate: float) -> Tensor:
        """Update the weights with the clipped gradients, if these are finite; return their norm, a float64 scalar on the device."""
        dense = [p for group in self.optimizer.param_groups for p in group["params"]]
        if distributed.world_size() > 1:
            for parameter in dense:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            distributed.all_reduce_sum([p.grad for p in dense if p.grad is not None])
        rows = sum((table.collect() for table in self.tables.values()), torch.zeros((), dtype=torch.float64, device=self.device))
        distributed.all_reduce_sum([rows])
        grads = [p.grad for p in dense if p.grad is not None]
        squares = [norm.double().square() for norm in torch._foreach_norm(grads)]
        norm = torch.stack([*squares, rows]).sum().sqrt() / self.scaler.scale
        factor = (self.settings.clip_norm / (norm + 1e-6)).clamp(max=1.0) / self.scaler.scale
        taken = norm.isfinite() & (self.losses.failed == 0)
        self.scaler.update(norm.isfinite())
        clipped_step(self.optimizer, factor, taken)
        for table in self.tables.values():
            table.step(self.state.earlier_steps + self.state.step + 1, rate, factor, taken)
        self.after_step()
        return norm

    def _done(self) -> bool:
        return self.training.stopped or self.state.validations_since_best >= self.settings.patience

    def _validate(self) -> None:
        self.check()
        self.optimizer.zero_grad(set_to_none=True)  # frees the gradients that are kept between steps
        self.model.eval()
        began = time.perf_counter()
        judged = self.validate()
        value, printed, last = None, {}, self.state.step == self.schedule.last_step or self.training.stopped
        if judged:
            metrics = dict(zip(judged, distributed.broadcast(list(judged.values())), strict=True))
            value = float(metrics[self.settings.eval_metric])
            printed = {"train_loss": self.losses.mean(), **metrics}
            self._log({**printed, "validation_s": time.perf_counter() - began})
        self._clock += time.perf_counter() - began  # validation does not count as training time
        self.losses.load([0.0, 0])
        due = self.schedule.validates(self.state.step) or self.training.stopped
        if self.state.take(value, due=due, last=last) or not (due or self.state.best_step):  # a pause leaves a model, too
            self._save("best.pt")
        self._save("last.pt")
        if printed:
            self._dispatch("on_validation", printed)

    # Files.

    def _due(self) -> bool:
        """Return whether a checkpoint is due. Several processes must agree, which waits for the device: only at log lines."""
        if distributed.world_size() > 1 and self.state.step % self.settings.log_every:
            return False
        return bool(distributed.broadcast([time.perf_counter() - self._saved >= self.settings.checkpoint_every_s])[0])

    def _save(self, name: str) -> None:
        self.check()
        rows = {name: table.state() for name, table in self.tables.items()}
        state = {
            "config": self.config.model_dump(mode="json"),
            "data": self.data,
            "progress": asdict(self.state),
            "losses": self.losses.state(),
            "model": self.model.state_dict() | {f"{name}.weight": rows[name].pop("weight") for name in rows},
            "rows": rows,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state(),
        }
        if distributed.rank() == 0:
            save_checkpoint(self.out / name, state)
        self._saved = time.perf_counter()

    def _load(self) -> None:
        state = load_checkpoint(self.out / "last.pt")
        if state["data"] != self.data:
            raise TrainingError(f"{self.out}/last.pt was trained on other data. A resumed run needs the same. Use another --out.")
        old, new = state["config"], self.config.model_dump(mode="json")
        for config in (old, new):
            for section, names in CHANGEABLE_ON_RESUME.items():
                config[section] = {name: value for name, value in config[section].items() if name not in names}
        changed = config_diff(old, new)
        if changed:
            raise TrainingError(
                f"The settings differ from those of {self.out}/last.pt: {changed}. Restore them to resume, or use another --out."
            )
        self.restore(state)
        self.state = TrainingState(**state["progress"])
        self.losses.load(state["losses"])
        log.info("resuming at step %d", self.state.step)

    def restore(self, state: dict[str, Any]) -> None:
        """Take the weights and the state of the optimiser from a checkpoint."""
        weights = state["model"]
        for name, table in self.tables.items():
            table.load({"weight": weights[f"{name}.weight"], **state["rows"][name]})
            weights[f"{name}.weight"] = table.weight
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load(state["scaler"])

    def _speed(self) -> dict[str, float]:
        now = time.perf_counter()
        rate = (self.state.examples - self._clock_examples) / max(now - self._clock, 1e-9)
        per_step = (now - self._clock) / self.settings.log_every
        self._clock, self._clock_examples = now, self.state.examples
        return {"examples_per_s": rate, "eta_s": per_step * (self.schedule.last_step - self.state.step)}

    def _log(self, figures: dict[str, float]) -> None:
        if distributed.rank() > 0:
            return
        self.log.add({"step": self.state.step, "epoch": self.state.epoch, **figures})
        self._dispatch("on_log", figures)
        printed = " | ".join(f"{name} {value:.4g}" for name, value in figures.items())
        at, last = self.state, self.schedule.last_step
        log.info("step %d/%d (%.0f%%) | epoch %d | %s", at.step, last, 100 * at.step / last, at.epoch, printed)

"""The loop: steps, precision, accumulation, schedule, validation, early stopping, checkpoints and logs.

A subclass says what one batch's loss is and how to validate; `fit` is the whole story. Files in the run's folder:
`last.pt` (resume from here), `best.pt` (the best validation so far), `metrics.jsonl` (one JSON object per log line or validation)
and `tensorboard/` (the same figures).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from twotower.checkpoint import load_checkpoint, save_checkpoint
from twotower.config import Config
from twotower.console import Report, log, progress, silent
from twotower.errors import TrainingError
from twotower.trainers.optimizer import choose_device, choose_precision, make_optimizer, schedule


class Batch(Protocol):
    """Whatever moves to a device."""

    def to(self, device: torch.device | str) -> Batch:
        """Copy to a device."""
        ...


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    examples: int = 0
    best: float = -math.inf
    best_step: int = 0
    waited: int = 0
    """Validations since the best."""


class BaseTrainer:
    """Train `model` for `config.training`, writing to `out`.

    Parameters
    ----------
    model
        Already of the right shape; moved to the device here.
    out
        The run's folder.
    data
        Fingerprint of what it is trained on; a resumed run must find the same.
    """

    def __init__(self, model: nn.Module, config: Config, out: Path, *, data: str) -> None:
        self.config, self.settings, self.out, self.data = config, config.training, out, data
        self.device = choose_device(self.settings.device)
        self.precision = choose_precision(self.settings.precision, self.device)
        self.model = model.to(self.device)
        self.optimizer = make_optimizer(self.model, self.settings.learning_rate, self.settings.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.at = Progress()
        self.total_steps = 1
        self._bar: Report = silent

    # What a subclass provides.

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        """Batches of an epoch from micro-batch `start`."""
        raise NotImplementedError

    def batches_per_epoch(self) -> int:
        """Micro-batches in an epoch."""
        raise NotImplementedError

    def loss(self, batch: Any) -> tuple[Tensor, int]:
        """Mean loss of a batch and its number of examples."""
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        """Metrics on the validation part; must hold `config.training.eval_metric`."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after every update of the weights."""

    # The loop.

    def fit(self, *, resume: bool = False) -> Progress:
        """Train to the last epoch or until the metric stops improving; leave `best.pt` and `last.pt`.

        Raises
        ------
        TrainingError
            The loss is not finite, or `resume` finds no checkpoint.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        steps_per_epoch = -(-self.batches_per_epoch() // self.settings.accumulation)
        self.total_steps = self.settings.max_steps or self.settings.num_epochs * steps_per_epoch
        if resume:
            self._load()
        self._start_logs()
        eval_steps = max(round(self.settings.eval_every * steps_per_epoch), 1)
        log.info(
            "training on %s in %s, %d steps of up to %d examples",
            self.device,
            str(self.precision).removeprefix("torch."),
            self.total_steps,
            self.settings.batch_size * self.settings.accumulation,
        )
        with progress() as self._bar, SummaryWriter(str(self.out / "tensorboard"), purge_step=self.at.step + 1) as board:
            while self.at.step < self.total_steps and not self._stalled():
                for batches in self._groups():
                    self._step(batches, board)
                    if self.at.step % eval_steps == 0 or self.at.step == self.total_steps:
                        self._validate(board)
                    if self.at.step >= self.total_steps or self._stalled():
                        break
                else:
                    self.at.epoch, self.at.step_in_epoch = self.at.epoch + 1, 0
            if self.at.best_step == 0:
                self._validate(board)
        self._save("last.pt")
        log.info("best %s %.4f at step %d of %d", self.settings.eval_metric, self.at.best, self.at.best_step, self.at.step)
        return self.at

    def _groups(self) -> Iterator[list[Any]]:
        """Micro-batches of an epoch from where the run stands, in groups of `accumulation`; the last group may hold fewer."""
        group = []
        for batch in self.batches(self.at.epoch, self.at.step_in_epoch):
            group.append(batch)
            if len(group) == self.settings.accumulation:
                yield group
                group = []
        if group:
            yield group

    def _step(self, batches: list[Any], board: SummaryWriter) -> None:
        self.model.train()
        rate = schedule(self.at.step, self.total_steps, self.settings.warmup_frac) * self.settings.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total, examples = 0.0, 0
        for batch in batches:
            with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not torch.float32):
                loss, size = self.loss(batch.to(self.device))
            value = float(loss.detach())
            if not math.isfinite(value):
                raise TrainingError(
                    f"The loss must stay finite. Got {value} at step {self.at.step + 1}. Lower training.learning_rate, or use "
                    f"training.precision: fp32. The last checkpoint stands in {self.out}."
                )
            self.scaler.scale(loss / len(batches)).backward()  # type: ignore[no-untyped-call]
            total, examples = total + value / len(batches), examples + size
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_step()
        self.at.step, self.at.step_in_epoch = self.at.step + 1, self.at.step_in_epoch + len(batches)
        self.at.examples += examples
        self._bar("train", self.at.step, self.total_steps)
        if self.at.step % self.settings.log_every == 0:
            self._log(board, {"loss": total, "lr": rate, "grad_norm": norm, **self._speed()})

    def _validate(self, board: SummaryWriter) -> None:
        self.model.eval()
        began = time.perf_counter()
        metrics = self.validate()
        value = float(metrics[self.settings.eval_metric])
        self._log(board, {**metrics, "validation_s": time.perf_counter() - began})
        self._clock += time.perf_counter() - began  # validation is not training time
        if value > self.at.best:
            self.at.best, self.at.best_step, self.at.waited = value, self.at.step, 0
            self._save("best.pt")
        else:
            self.at.waited += 1
        self._save("last.pt")

    def _stalled(self) -> bool:
        return self.at.waited >= self.settings.patience

    # Files.

    def _save(self, name: str) -> None:
        state = {
            "config": self.config.model_dump(mode="json"),
            "data": self.data,
            "progress": asdict(self.at),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }
        save_checkpoint(self.out / name, state)

    def _load(self) -> None:
        state = load_checkpoint(self.out / "last.pt")
        if state["data"] != self.data:
            raise TrainingError(f"A resumed run must keep its data. They changed since {self.out}/last.pt. Use another --out.")
        changed = differences(state["config"], self.config.model_dump(mode="json"))
        if changed:
            raise TrainingError(
                f"A resumed run must keep its settings. In {self.out}/last.pt {changed}. Use another --out, or those settings."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])
        self.at = Progress(**state["progress"])
        log.info("resuming at step %d of %d", self.at.step, self.total_steps)

    def _start_logs(self) -> None:
        """Keep the figures up to the step the run starts from; nothing is reported twice."""
        self._clock, self._clock_examples = time.perf_counter(), self.at.examples
        path = self.out / "metrics.jsonl"
        rows = read_rows(path) if self.at.step else []
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= self.at.step))

    def _speed(self) -> dict[str, float]:
        now = time.perf_counter()
        rate = (self.at.examples - self._clock_examples) / max(now - self._clock, 1e-9)
        per_step = (now - self._clock) / self.settings.log_every
        self._clock, self._clock_examples = now, self.at.examples
        return {"examples_per_s": rate, "eta_s": per_step * (self.total_steps - self.at.step)}

    def _log(self, board: SummaryWriter, facts: dict[str, float]) -> None:
        row = {"step": self.at.step, "epoch": self.at.epoch, **facts}
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in facts.items():
            board.add_scalar(name, value, self.at.step)
        shown = " | ".join(f"{name} {value:.4g}" for name, value in facts.items())
        log.info(
            "step %d/%d (%.0f%%) | epoch %d | %s",
            self.at.step,
            self.total_steps,
            100 * self.at.step / self.total_steps,
            self.at.epoch,
            shown,
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`; none when there is no file, and a line that a killed run left half-written is passed over."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """Which settings differ, in words; empty when none do."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = differences(a, b, f"{prefix}{name}.")
            found += [inner] if inner else []
        elif a != b:
            found.append(f"{prefix}{name} was {a!r}, is {b!r}")
    return "; ".join(found)

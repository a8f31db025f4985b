"""Choose the device, precision and optimiser of a run, and compute the loss scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twotower.errors import TrainingError
from twotower.utils import hardware
from twotower.utils.console import log

KEPT_NUMBERS = 1 << 20
"""On a CPU, gradients of at least this size become zero in place: new memory of that size costs more than zeroing it."""


def choose_device(wanted: str, found: hardware.Torch | None = None) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda".

    Parameters
    ----------
    found
        The installed PyTorch; None: look it up. A GPU without kernels in this PyTorch does not count.

    Raises
    ------
    TrainingError
        "cuda" was requested and no GPU is usable.
    """
    found = found or hardware.installed()
    usable = 0 in found.usable
    if wanted == "cuda" and not usable:
        why = "PyTorch has no kernels for the GPU it sees" if found.gpus else "PyTorch found no GPU"
        raise TrainingError(f"training.device is cuda, but {why}. Use auto or cpu. `twotower doctor` shows details.")
    if wanted == "auto" and found.gpus and not usable:
        log.warning("PyTorch has no kernels for %s: training on the CPU. `twotower doctor` shows details.", found.gpus[0].name)
    return torch.device("cuda" if usable and wanted != "cpu" else "cpu")


def choose_precision(wanted: str, device: torch.device, capability: tuple[int, int] | None = None) -> torch.dtype:
    """Return the data type of matrix products for "auto", "fp32", "bf16" or "fp16".

    Parameters
    ----------
    capability
        Compute capability of the GPU; None: read it from the device. GPUs from 8.0 on support bf16; older ones use fp16.

    Examples
    --------
    >>> choose_precision("auto", torch.device("cpu"))
    torch.float32
    """
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if wanted != "auto":
        return named[wanted]
    if device.type != "cuda":
        return torch.float32
    return named[hardware.auto_precision(capability or torch.cuda.get_device_capability(device))]


def make_optimizer(model: nn.Module, rate: float, decay: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices of linear layers only, not on tables, norms, biases or other vectors."""
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if id(parameter) in decayed], "weight_decay": decay},
        {"params": [parameter for parameter in trained if id(parameter) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


def clipped_step(optimizer: torch.optim.AdamW, factor: Tensor, taken: Tensor) -> None:
    """Update the weights with the gradients times `factor`, in one pass, and remove the gradients.

    Parameters
    ----------
    factor, taken
        Scalars on the device of the weights, float and bool, so that nothing waits for the device. With `taken` false, the weights
        stay unchanged.
    """
    optimizer.grad_scale, optimizer.found_inf = factor.reciprocal().float(), (~taken).float()  # type: ignore[attr-defined]
    optimizer.step()
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if parameter.grad is not None and parameter.numel() >= KEPT_NUMBERS and parameter.device.type == "cpu":
            parameter.grad.zero_()
        else:
            parameter.grad = None


class Losses:
    """Sum of the training losses since the last validation, kept on the device.

    Attributes
    ----------
    total
        float64 scalar, nats.
    count
        Number of losses.
    failed
        int64 scalar: the first step with a loss that is not finite; 0 if there is none.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.total, self.count = torch.zeros((), dtype=torch.float64, device=device), 0
        self.failed = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, loss: Tensor, step: int) -> None:
        """Add the loss of step `step` (from 1), a float64 scalar."""
        self.total += loss
        self.count += 1
        self.failed = torch.where(loss.isfinite() | (self.failed > 0), self.failed, step)

    def mean(self) -> float:
        """Return the mean loss in nats."""
        return float(self.total) / max(self.count, 1)

    def state(self) -> list[float]:
        """Return the state for a checkpoint."""
        return [float(self.total), self.count]

    def load(self, state: Sequence[float]) -> None:
        """Restore what `state` returned."""
        self.total.fill_(state[0])
        self.count = int(state[1])


class LossScale:
    """Scale the loss for fp16, so that small gradients do not underflow; like `torch.amp.GradScaler`, for dense and row gradients.

    A step with overflowing gradients is skipped and the scale is halved; after `patience` good steps in a row it doubles. All of
    this happens on the device, without waiting for it.

    Attributes
    ----------
    scale
        float64 scalar: factor of the loss.
    good
        int64 scalar: consecutive steps with finite gradients.
    exhausted
        bool scalar: gradients overflowed at the minimum scale. Training must stop; see `BaseTrainer.check`.
    """

    def __init__(self, device: torch.device | str = "cpu", *, enabled: bool, patience: int = 2000) -> None:
        self.enabled, self.patience = enabled, patience
        self.scale = torch.full((), 65536.0 if enabled else 1.0, dtype=torch.float64, device=device)
        self.good = torch.zeros((), dtype=torch.int64, device=device)
        self.exhausted = torch.zeros((), dtype=torch.bool, device=device)

    def update(self, finite: Tensor) -> None:
        """Update the scale after a step; `finite` is a bool scalar: whether its gradients were finite."""
        self.exhausted |= ~finite & (self.scale <= 1)
        self.good = torch.where(finite, self.good + 1, 0)
        if self.enabled:
            grown = torch.where(self.good % self.patience == 0, self.scale * 2, self.scale)
            self.scale = torch.where(finite, grown, self.scale / 2)

    def state(self) -> list[float]:
        """Return the state for a checkpoint."""
        return [float(self.enabled), float(self.scale), int(self.good)]

    def load(self, state: Sequence[float]) -> None:
        """Restore what `state` returned. A run that is resumed in another precision, on another device, keeps its own start."""
        enabled, scale, good = state
        if self.enabled and enabled:
            self.scale.fill_(scale)
            self.good.fill_(int(good))

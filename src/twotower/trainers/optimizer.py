"""Choices a run makes once: device, precision, optimiser, learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twotower.errors import TrainingError
from twotower.utils import hardware
from twotower.utils.console import log


def choose_device(wanted: str, found: hardware.Torch | None = None) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda".

    Parameters
    ----------
    found
        What there is; looked up when None. A GPU that PyTorch sees but has no kernels for is none.

    Raises
    ------
    TrainingError
        "cuda" was asked for and there is none.
    """
    found = found or hardware.installed()
    usable = 0 in found.usable
    if wanted == "cuda" and not usable:
        why = "It has no kernels for the GPU it sees" if found.gpus else "Found none"
        raise TrainingError(
            f"training.device: cuda needs a GPU that PyTorch can use. {why}. Use auto or cpu; `twotower doctor` says more."
        )
    if wanted == "auto" and found.gpus and not usable:
        log.warning("PyTorch has no kernels for %s: training on the CPU. `twotower doctor` says more.", found.gpus[0].name)
    return torch.device("cuda" if usable and wanted != "cpu" else "cpu")


def choose_precision(wanted: str, device: torch.device, capability: tuple[int, int] | None = None) -> torch.dtype:
    """Return the type of the matrix products.

    Parameters
    ----------
    capability
        Compute capability of the GPU; read from the device when None. bf16 is in hardware from 8.0 on: older ones take fp16.
    """
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if wanted != "auto":
        return named[wanted]
    if device.type != "cuda":
        return torch.float32
    return named[hardware.auto_precision(capability or torch.cuda.get_device_capability(device))]


def make_optimizer(model: nn.Module, rate: float, decay: float) -> torch.optim.AdamW:
    """AdamW with decay on the matrices of linear layers alone: never on tables, norms, biases or other vectors."""
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if id(parameter) in decayed], "weight_decay": decay},
        {"params": [parameter for parameter in trained if id(parameter) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


def clipped_step(optimizer: torch.optim.AdamW, factor: Tensor, taken: Tensor) -> None:
    """Update the weights with the gradients times `factor`, in the same pass over them; not at all where `taken` is false.

    Parameters
    ----------
    factor, taken
        Scalars on the device of the weights, float and bool: nothing waits for what they hold.
    """
    optimizer.grad_scale, optimizer.found_inf = factor.reciprocal().float(), (~taken).float()  # type: ignore[attr-defined]
    optimizer.step()


def schedule(step: int, total: int, warmup_frac: float) -> float:
    """Factor of the learning rate at `step` (from 0): a linear rise over `warmup_frac` of the steps, then a cosine to zero."""
    warmup = max(round(total * warmup_frac), 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(total - warmup, 1), 1.0)))


class Losses:
    """Training losses since the last validation, added up on the device.

    Attributes
    ----------
    total
        float64 scalar, nats.
    count
        How many they are.
    failed
        int64 scalar: the first step whose loss was not finite; 0 as long as there is none.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.total, self.count = torch.zeros((), dtype=torch.float64, device=device), 0
        self.failed = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, loss: Tensor, step: int) -> None:
        """Count the loss of step `step` (from 1), a float64 scalar."""
        self.total += loss
        self.count += 1
        self.failed = torch.where(loss.isfinite() | (self.failed > 0), self.failed, step)

    def mean(self) -> float:
        """Return their mean in nats."""
        return float(self.total) / max(self.count, 1)

    def state(self) -> list[float]:
        """What a resumed run needs."""
        return [float(self.total), self.count]

    def load(self, state: Sequence[float]) -> None:
        """Take over what `state` returned."""
        self.total.fill_(state[0])
        self.count = int(state[1])


class LossScale:
    """Scaling of the loss for fp16, so that small gradients survive; as `torch.amp.GradScaler`, over dense and row gradients alike.

    A step whose gradients overflowed is left out, and the scale halved; after `patience` good steps in a row it doubles. All of it
    happens on the device, which nobody waits for.

    Attributes
    ----------
    scale
        float64 scalar: what the loss is multiplied by.
    good
        int64 scalar: steps in a row whose gradients were finite.
    exhausted
        bool scalar: gradients overflowed when there was no scale left to lower. Then training has to end; see `check`.
    """

    def __init__(self, device: torch.device | str = "cpu", *, enabled: bool, patience: int = 2000) -> None:
        self.enabled, self.patience = enabled, patience
        self.scale = torch.full((), 65536.0 if enabled else 1.0, dtype=torch.float64, device=device)
        self.good = torch.zeros((), dtype=torch.int64, device=device)
        self.exhausted = torch.zeros((), dtype=torch.bool, device=device)

    def update(self, finite: Tensor) -> None:
        """Take note of whether the gradients of a step, which are left out otherwise, are finite: a bool scalar."""
        self.exhausted |= ~finite & (self.scale <= 1)
        self.good = torch.where(finite, self.good + 1, 0)
        if self.enabled:
            grown = torch.where(self.good % self.patience == 0, self.scale * 2, self.scale)
            self.scale = torch.where(finite, grown, self.scale / 2)

    def state(self) -> list[float]:
        """What a resumed run needs."""
        return [float(self.scale), int(self.good)]

    def load(self, state: Sequence[float]) -> None:
        """Take over what `state` returned."""
        self.scale.fill_(state[0])
        self.good.fill_(int(state[1]))

"""Choices a run makes once: device, precision, optimiser, learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from twotower import hardware
from twotower.console import log
from twotower.errors import TrainingError


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


def schedule(step: int, total: int, warmup_frac: float) -> float:
    """Factor of the learning rate at `step` (from 0): a linear rise over `warmup_frac` of the steps, then a cosine to zero."""
    warmup = max(round(total * warmup_frac), 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(total - warmup, 1), 1.0)))


class LossScale:
    """Scaling of the loss for fp16, so that small gradients survive; as `torch.amp.GradScaler`, over dense and row gradients alike.

    A step whose gradients overflowed is left out, and the scale halved; after `patience` good steps in a row it doubles.
    """

    def __init__(self, *, enabled: bool, patience: int = 2000) -> None:
        self.enabled, self.patience = enabled, patience
        self.scale, self.good = 65536.0 if enabled else 1.0, 0

    def judge(self, finite: bool) -> bool:
        """Take note of a step's gradients; True when the step is to be taken.

        Raises
        ------
        TrainingError
            They are not finite, and no scale is to blame.
        """
        if finite:
            self.good += 1
            if self.enabled and self.good % self.patience == 0:
                self.scale *= 2
            return True
        if self.scale <= 1:
            raise TrainingError(
                "The gradients must stay finite. They overflowed with no loss scale left to lower. Lower training.learning_rate, "
                "or use training.precision: fp32. The last checkpoint stands."
            )
        self.scale, self.good = self.scale / 2, 0
        return False

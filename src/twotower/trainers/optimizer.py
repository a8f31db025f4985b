"""Choices a run makes once: device, precision, optimiser, learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from twotower.errors import TrainingError


def choose_device(wanted: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda".

    Raises
    ------
    TrainingError
        "cuda" was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise TrainingError("training.device: cuda needs a GPU that PyTorch can use. Found none. Use auto or cpu.")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


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
    major, _ = capability or torch.cuda.get_device_capability(device)
    return torch.bfloat16 if major >= 8 else torch.float16


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

"""Mix the weights of an updated model with those before.

A few new events move the weights in the right direction and, by chance, in many others; part of the way is often better than all of
it. Wortsman et al., "Robust Fine-Tuning of Zero-Shot Models" (CVPR 2022), take the same mean of two models.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def mix_weights(before: Weights, after: Weights, share: float) -> dict[str, Tensor]:
    """Return `before` + `share` · (`after` − `before`), with the types of `after`.

    The factor of a table that is updated by rows is that of `after`.

    Parameters
    ----------
    before, after
        State of the same model before and after a training.
    share
        Between 0 and 1; with 1 the result is `after` to the bit.

    Examples
    --------
    >>> mix_weights({"w": torch.tensor([0.0, 4.0])}, {"w": torch.tensor([1.0, 2.0])}, 0.5)["w"]
    tensor([0.5000, 3.0000])
    """
    if share == 1:
        return dict(after)
    factors = {name: name.removesuffix("weight") + "scale" for name in after if name.endswith("weight")}
    factors = {name: factor for name, factor in factors.items() if factor in after}
    mixed = dict(after)
    for name, new in after.items():
        if new.is_floating_point() and name not in factors.values():
            old = before[name].to(wide(new))
            if name in factors:
                old = old * (before[factors[name]] / after[factors[name]]).to(old.dtype)
            mixed[name] = torch.lerp(old, new.to(wide(new)), share).to(new.dtype)
    return mixed


def wide(tensor: Tensor) -> torch.dtype:
    """Return the type in which numbers of a tensor are added: float32 for shorter ones."""
    return torch.promote_types(tensor.dtype, torch.float32)

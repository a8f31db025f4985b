"""Compute the output vector of both towers from their embedded fields, with a network that the settings name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from twotower.errors import ConfigError
from twotower.models.layers.dropout import Dropout
from twotower.models.layers.embedding import added
from twotower.models.layers.interaction import INTERACTIONS
from twotower.models.layers.pooling import widened
from twotower.utils.config import ResolvedTower
from twotower.utils.registry import Registry

MLP_DROPOUT = 0.5  # on the input of the MLP, which overfits more easily than the linear path
MIN_SQUARED_NORM = 1e-6
"""Lower bound of a squared norm. For a zero vector (an item without any information) the gradient is scaled by
1 / √MIN_SQUARED_NORM. With a smaller bound, gradient clipping would cancel the steps of all other vectors, and fp16 would
overflow."""


class MLPTower(nn.Module):
    """The tower "mlp": W Σ fields + MLP(interaction(fields)), from embedded fields [n, F, d] to vectors [n, D].

    The linear path alone is matrix factorisation with features: it learns fast and generalises. The MLP's last layer starts at zero
    and adds feature interactions. With a single entry in `hidden_dims` there is no MLP and no interaction. W is the identity if the
    widths agree. Nothing is normalised before the MLP: fields start small, and amplified noise made it overfit.
    """

    def __init__(self, fields: int, config: ResolvedTower) -> None:
        super().__init__()
        dim, (*hidden, out) = config.embedding_dim, config.hidden_dims
        self.straight: nn.Module = nn.Identity()
        if dim != out:
            linear = nn.Linear(dim, out, bias=False)
            nn.init.eye_(linear.weight)
            self.straight = linear
        self.mlp: nn.Module | None = None
        if hidden:
            interaction = INTERACTIONS[config.interaction](fields, dim, config.cross_layers)
            layers: list[nn.Module] = [interaction, Dropout(MLP_DROPOUT)]
            for width, wider in zip([interaction.width, *hidden], hidden, strict=False):
                layers += [nn.Linear(width, wider), nn.GELU(), Dropout(config.dropout)]
            last = nn.Linear(hidden[-1], out)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.mlp = nn.Sequential(*layers, last)

    def forward(self, fields: Tensor) -> Tensor:
        """Return vectors [n, D] from embeddings [n, F, d]."""
        vectors: Tensor = self.straight(fields.sum(dim=1))
        return vectors if self.mlp is None else vectors + self.mlp(fields)

    def of_sum(self, fields: Sequence[Tensor]) -> Tensor:
        """Return vectors [n, D] from F embeddings [n, d], without an MLP: the fields need not be stacked."""
        vectors: Tensor = self.straight(added(fields))
        return vectors


TOWERS: Registry[Callable[[int, ResolvedTower], nn.Module]] = Registry("tower", {"mlp": MLPTower})
"""Towers: called with the number of fields F and the settings of the tower, they give a module from [n, F, d] to [n, D].

d is `config.embedding_dim`, D is `config.hidden_dims[-1]`. Field 0 is the id. In the user tower the last field is the encoded
history. The module does not normalise its output, and works on each of the n rows alone.
"""


class TowerHead(nn.Module):
    """Tower head: x / √(|x|² + shrinkage²), where x is the output of the tower that `config.tower` names.

    With `norm_shrinkage`, a user with little information has a short vector instead of a noisy one of full length.
    """

    def __init__(self, fields: int, config: ResolvedTower) -> None:
        super().__init__()
        self.least = max(config.norm_shrinkage**2, MIN_SQUARED_NORM)
        self.body, self.width = TOWERS[config.tower](fields, config), config.hidden_dims[-1]

    def forward(self, fields: Sequence[Tensor]) -> Tensor:
        """Return vectors float32 [n, D] from F embeddings [n, d], of length one or, with `norm_shrinkage`, shorter."""
        raw = self.raw(fields)
        return raw / self.divisor(raw)

    def divisor(self, raw: Tensor) -> Tensor:
        """Return the divisor [n, 1] that normalises raw vectors [n, D]."""
        return torch.sqrt(raw.square().sum(dim=-1, keepdim=True) + self.least)

    def raw(self, fields: Sequence[Tensor]) -> Tensor:
        """Return vectors float32 [n, D] before normalisation, from F embeddings [n, d].

        Raises
        ------
        ConfigError
            A tower that was registered gives another shape.
        """
        rows = len(fields[0])
        if isinstance(self.body, MLPTower) and self.body.mlp is None:
            return widened(self.body.of_sum(fields))
        vectors: Tensor = self.body(torch.stack(list(fields), dim=1))
        if vectors.shape != (rows, self.width):
            raise ConfigError(
                f"The tower {type(self.body).__name__} gives the shape {tuple(vectors.shape)} for {rows} rows. "
                f"Expected ({rows}, {self.width}): hidden_dims[-1] numbers per row. Correct its forward."
            )
        return widened(vectors)

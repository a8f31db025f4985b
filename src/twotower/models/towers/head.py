"""What both towers end with: a straight path from the fields, and an MLP over their interaction, → unit vector."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from twotower.config import TowerConfig
from twotower.models.layers.dropout import Dropout
from twotower.models.layers.interaction import INTERACTIONS
from twotower.models.layers.pooling import widened

MLP_DROPOUT = 0.5  # of what the MLP reads: it learns products by heart where the straight path cannot


class TowerHead(nn.Module):
    """unit(W Σ fields + MLP(interaction(fields))).

    The straight path alone is matrix factorisation with features, which learns fast and generalises; the MLP's last layer starts
    at zero and adds what products of features know beyond it. With a single entry in `hidden_dims` there is no MLP, and no
    interaction. W is the identity where the widths agree. Nothing is normalised before the MLP: fields start small, and blowing
    their noise up made it overfit.
    """

    def __init__(self, fields: int, config: TowerConfig) -> None:
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
        """Embeddings [n, F, d] → unit vectors float32 [n, D]."""
        return F.normalize(self.raw(fields), dim=-1)

    def raw(self, fields: Tensor) -> Tensor:
        """Embeddings [n, F, d] → vectors float32 [n, D] before they are brought to length one."""
        vectors: Tensor = self.straight(fields.sum(dim=1))
        if self.mlp is not None:
            vectors = vectors + self.mlp(fields)
        return widened(vectors)

"""What both towers end with: fields → interaction → MLP, beside a straight path, → unit vector."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from twotower.config import TowerConfig
from twotower.models.layers.interaction import INTERACTIONS


class TowerHead(nn.Module):
    """unit(W Σ fields + MLP(interaction(fields))).

    The straight path alone is matrix factorisation with features, which learns fast and generalises; the MLP's last layer starts at
    zero and adds what products of features know beyond it.
    """

    def __init__(self, fields: int, config: TowerConfig) -> None:
        super().__init__()
        dim, out = config.embedding_dim, config.hidden_dims[-1]
        self.interaction = INTERACTIONS[config.interaction](fields, dim, config.cross_layers)
        self.straight = nn.Linear(dim, out, bias=False)
        nn.init.eye_(self.straight.weight)
        layers: list[nn.Module] = [nn.LayerNorm(self.interaction.width)]
        width = self.interaction.width
        for hidden in config.hidden_dims[:-1]:
            layers += [nn.Linear(width, hidden), nn.GELU(), nn.Dropout(config.dropout)]
            width = hidden
        last = nn.Linear(width, out)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(*layers, last)
        self.dropout = config.dropout

    def forward(self, fields: Tensor) -> Tensor:
        """Embeddings [n, F, d] → unit vectors float32 [n, D]."""
        fields = F.dropout(fields, self.dropout, self.training)
        vectors = self.straight(fields.sum(dim=1)) + self.mlp(self.interaction(fields))
        return F.normalize(vectors.float(), dim=-1)

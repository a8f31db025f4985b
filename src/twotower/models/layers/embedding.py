"""Fields → embeddings of one width. Tables are named, so that both towers can share them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.batches import FieldSpec
from twotower.schema import PAD

GEO_SCALES_KM = (1.0, 3.0, 10.0, 40.0)
GEO_WAVES = 32  # random directions per scale
INIT_STD = 0.05


class EmbeddingTables(nn.ModuleDict):
    """Tables by name; row PAD of each is zero and stays zero."""

    def add(self, name: str, rows: int, dim: int) -> None:
        """Make a table [rows, dim], unless it exists with the same number of rows."""
        key = name.replace(".", "/")
        if key in self:
            assert self.lookup(name).num_embeddings == rows, f"{name} is shared by fields of different sizes"
            return
        table = nn.Embedding(rows, dim, padding_idx=PAD)
        nn.init.normal_(table.weight, std=INIT_STD)
        with torch.no_grad():
            table.weight[PAD].zero_()
        self[key] = table

    def lookup(self, name: str) -> nn.Embedding:
        """Return the table called `name`."""
        table = self[name.replace(".", "/")]
        assert isinstance(table, nn.Embedding)
        return table


class GeoWaves(nn.Module):
    """Random Fourier features of a place (Rahimi & Recht, 2007): products of two places' features fall with their distance,
    at several scales from one kilometre to forty. Fixed, not trained."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        waves = torch.randn(len(GEO_SCALES_KM), GEO_WAVES, 3, generator=generator) / torch.tensor(GEO_SCALES_KM).view(-1, 1, 1)
        self.waves: Tensor
        self.register_buffer("waves", waves.reshape(-1, 3))
        self.width = 2 * len(GEO_SCALES_KM) * GEO_WAVES

    def forward(self, point: Tensor) -> Tensor:
        """Points [n, 3] in km → [n, 256]; the zero point (unknown) → zeros."""
        # In float32 whatever the mixed precision: phases reach thousands of radians.
        with torch.autocast(point.device.type, enabled=False):
            phase = point.float() @ self.waves.T
            features = torch.cat([phase.cos(), phase.sin()], dim=-1) / math.sqrt(self.width / 2)
            known: Tensor = (point != 0).any(dim=-1, keepdim=True)
            return features * known


class FieldEmbedding(nn.Module):
    """Every field of a batch → [n, F, d]."""

    def __init__(self, fields: tuple[FieldSpec, ...], dim: int, tables: EmbeddingTables) -> None:
        super().__init__()
        self.fields = fields
        self.dense = nn.ModuleDict()  # see `_key`
        for spec in fields:
            if spec.kind == "dense":
                self.dense[_key(spec.name)] = nn.Linear(spec.sizes[0], dim)
            elif spec.kind == "geo":
                for scale, rows in enumerate(spec.sizes):
                    tables.add(f"{spec.table}.{scale}", rows, dim)
            else:
                tables.add(spec.table, spec.sizes[0], dim)
        for layer in self.dense.values():
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=INIT_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, values: dict[str, Tensor], tables: EmbeddingTables, waves: tuple[GeoWaves, nn.Linear] | None) -> Tensor:
        """Embed `values` (tensors by field name, as `FieldSpec` says) → [n, F, d]."""
        return torch.stack([self._embed(spec, values, tables, waves) for spec in self.fields], dim=1)

    def _embed(
        self, spec: FieldSpec, values: dict[str, Tensor], tables: EmbeddingTables, waves: tuple[GeoWaves, nn.Linear] | None
    ) -> Tensor:
        value = values[spec.name]
        if spec.kind == "rows":
            return F.embedding(value, tables.lookup(spec.table).weight, padding_idx=PAD)
        if spec.kind == "bag":
            return F.embedding_bag(value, tables.lookup(spec.table).weight, mode="mean", padding_idx=PAD)
        if spec.kind == "dense":
            embedded: Tensor = self.dense[_key(spec.name)](value)
            return embedded
        assert waves is not None
        features, project = waves
        cells = [
            F.embedding(value[:, s], tables.lookup(f"{spec.table}.{s}").weight, padding_idx=PAD) for s in range(len(spec.sizes))
        ]
        smooth: Tensor = project(features(values[f"{spec.name}.point"]))
        return torch.stack(cells).sum(dim=0) + smooth


def _key(name: str) -> str:
    """Name of a field's layer: a module must be called neither like a method of its container ("type", "values") nor "a.b"."""
    return "field " + name.replace(".", "/")

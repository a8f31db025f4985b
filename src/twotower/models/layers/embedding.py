"""Embed the fields of users and items in one width. Tables have names, so that both towers can share them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twotower.errors import ConfigError, nearest
from twotower.features.batches import FieldSpec
from twotower.models.layers.tables import INIT_STD, RowTable, Table
from twotower.utils.config import ModelConfig

GEO_SCALES_KM = (1.0, 3.0, 10.0, 40.0)
GEO_WAVES = 32  # random directions per scale


class EmbeddingTables(nn.ModuleDict):
    """Embedding tables by name, each stored as the settings say."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def add(self, name: str, ids: int, dim: int) -> None:
        """Add a table for `ids` ids, unless it exists; an existing one must have the same number of ids."""
        if _key(name) in self:
            assert self.lookup(name).ids == ids, f"{name} is shared by fields of different sizes"
            return
        config = self.config.stored(name, ids)
        self[_key(name)] = (RowTable if config.update == "sparse" else Table)(name, ids, dim, config)

    def lookup(self, name: str) -> Table:
        """Return the table called `name`."""
        table = self[_key(name)]
        assert isinstance(table, Table)
        return table

    def check(self) -> None:
        """Check that `model.tables` names only tables of the model. Call it after all tables were added.

        Raises
        ------
        ConfigError
            A name is unknown; the message suggests the nearest one.
        """
        known = [name.replace("/", ".") for name in self]
        for name in self.config.tables:
            if name not in known:
                raise ConfigError(f"{name!r} in model.tables is not a table of the model.{nearest(name, known)}")


class GeoWaves(nn.Module):
    """Random Fourier features of a location (Rahimi & Recht, 2007), fixed, not trained.

    The inner product of two locations' features decreases with their distance, at several scales from 1 to 40 km.

    Examples
    --------
    >>> GeoWaves()(torch.zeros(1, 3)).shape
    torch.Size([1, 256])
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        waves = torch.randn(len(GEO_SCALES_KM), GEO_WAVES, 3, generator=generator) / torch.tensor(GEO_SCALES_KM).view(-1, 1, 1)
        self.waves: Tensor
        self.register_buffer("waves", waves.reshape(-1, 3))
        self.width = 2 * len(GEO_SCALES_KM) * GEO_WAVES

    def forward(self, point: Tensor) -> Tensor:
        """Return features [n, 256] of points [n, 3] in km; the zero point stands for an unknown location and gives zeros."""
        # Always in float32, also with mixed precision: phases reach thousands of radians.
        with torch.autocast(point.device.type, enabled=False):
            phase = self._phase(point.to(self.waves.dtype))
            features = torch.cat([phase.cos(), phase.sin()], dim=-1) / math.sqrt(self.width / 2)
            known: Tensor = (point != 0).any(dim=-1, keepdim=True)
            return features * known

    def _phase(self, point: Tensor) -> Tensor:
        """Return the inner products [n, waves].

        A phase of thousands of radians has three exact decimals, and matrix products round the last one differently by batch size
        and library. Outside training the sum is written out, so that every runtime gives the same result.
        """
        if self.training:
            return point @ self.waves.T
        x, y, z = self.waves.T
        phase: Tensor = point[:, 0:1] * x + point[:, 1:2] * y + point[:, 2:3] * z
        return phase


class FieldEmbedding(nn.Module):
    """Embeds all fields of a batch: F tensors [n, d]."""

    def __init__(self, fields: tuple[FieldSpec, ...], dim: int, tables: EmbeddingTables) -> None:
        super().__init__()
        self.fields = fields
        self.dense = nn.ModuleDict()  # see `_key`
        for spec in fields:
            if spec.kind == "dense":
                self.dense["field " + _key(spec.name)] = nn.Linear(spec.sizes[0], dim)
            elif spec.kind == "geo":
                for scale, rows in enumerate(spec.sizes):
                    tables.add(f"{spec.table}.{scale}", rows, dim)
            else:
                tables.add(spec.table, spec.sizes[0], dim)
        for layer in self.dense.values():
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=INIT_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, values: dict[str, Tensor], tables: EmbeddingTables, waves: tuple[GeoWaves, nn.Linear] | None) -> list[Tensor]:
        """Return an embedding [n, d] for each field of `values`: tensors by field name, as described by `FieldSpec`."""
        return [self._embed(spec, values, tables, waves) for spec in self.fields]

    def _embed(
        self, spec: FieldSpec, values: dict[str, Tensor], tables: EmbeddingTables, waves: tuple[GeoWaves, nn.Linear] | None
    ) -> Tensor:
        value = values[spec.name]
        if spec.kind == "rows":
            vectors: Tensor = tables.lookup(spec.table)(value)
            return vectors
        if spec.kind == "bag":
            return tables.lookup(spec.table).mean(value)
        if spec.kind == "dense":
            embedded: Tensor = self.dense["field " + _key(spec.name)](value)
            return embedded
        assert waves is not None
        features, project = waves
        cells = [tables.lookup(f"{spec.table}.{scale}")(value[:, scale]) for scale in range(len(spec.sizes))]
        smooth: Tensor = project(features(values[f"{spec.name}.point"]))
        return added([*cells, smooth])


def added(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape. It takes less time and memory than the sum of their stack.

    Examples
    --------
    >>> added([torch.ones(2), torch.ones(2), torch.ones(2)])
    tensor([3., 3., 3.])
    """
    return functools.reduce(torch.add, parts)


def _key(name: str) -> str:
    """Return a valid submodule name, which has no dot. (The prefix "field " avoids names of the container's methods.)"""
    return name.replace(".", "/")

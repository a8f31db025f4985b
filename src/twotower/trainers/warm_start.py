"""Initialise the item ids of a new model from iALS factors.

Random initial vectors are noise that training must first remove. An item with few events is rarely read, so after the few useful
epochs on sparse data its id would still be mostly noise. iALS factors take seconds to compute (results in docs/method.md).
"""

from __future__ import annotations

import torch

from twotower.baselines.als import item_vectors
from twotower.data.dataset import Dataset
from twotower.models.layers.tables import INIT_STD, RowTable
from twotower.models.two_tower import TwoTower
from twotower.utils import distributed
from twotower.utils.config import Config


@torch.no_grad()
def init_item_ids_from_als(model: TwoTower, dataset: Dataset, config: Config) -> None:
    """Fill the table of item ids with iALS item factors, scaled to the mean length of the random vectors that they replace.

    With several processes the first one computes them. Tables that are updated by rows or hashed keep their random values: such
    catalogues are too large to factorise first, and ids that share rows have no factors of their own.
    """
    table = model.tables.lookup("item.id")
    if config.model.item_tower.id_init == "random" or isinstance(table, RowTable) or table.hashing is not None:
        return
    found = torch.zeros_like(table.weight)
    if distributed.rank() == 0:
        width = table.weight.shape[1]
        vectors = item_vectors(dataset, width, length=INIT_STD * width**0.5, seed=config.seed)
        found.copy_(torch.from_numpy(vectors[: table.ids]))
    distributed.all_reduce_sum([found])
    table.weight.copy_(found)

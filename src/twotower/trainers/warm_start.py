"""What a model knows before its first step: which items the same people visit.

Noise has to be forgotten before it can mean something, and an item with few visits is seldom read: after the few passes over sparse
data that help, its id would still be mostly noise. Factors of iALS are found in seconds and say from the start what the first
passes are spent on (figures in docs/method.md).
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
    """Fill the table of item ids with item factors, as long on average as the noise that they replace.

    Of several processes the first one finds them. Tables that are updated by rows or hashed keep their noise: so many items are
    too many to factorise first, and ids that share rows have no factors of their own.
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

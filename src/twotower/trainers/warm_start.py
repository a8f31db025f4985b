"""Initialise the item ids of a new model from iALS factors.

Random initial vectors are noise that training must first remove. An item with few events is rarely read, so after the few useful
epochs on sparse data its id would still be mostly noise. iALS factors take seconds to compute (results in docs/method.md).
"""

from __future__ import annotations

import torch

from twotower.baselines.als import MAX_ALS_ITEMS, item_vectors
from twotower.data.dataset import Dataset
from twotower.models.layers.tables import INIT_STD, RowTable
from twotower.models.two_tower import TwoTower
from twotower.utils import distributed
from twotower.utils.config import Config


@torch.no_grad()
def init_item_ids_from_als(model: TwoTower, dataset: Dataset, config: Config) -> None:
    """Fill the table of item ids with iALS item factors, scaled to the mean length of the random vectors that they replace.

    With several processes the first one computes them, and each keeps its rows. A table of more than `MAX_ALS_ITEMS` ids keeps its
    random values, because factors would take long; so does a hashed one, because ids that share rows have no factors of their own.
    """
    table = model.tables.lookup("item.id")
    if config.model.item_tower.id_init == "random" or table.ids > MAX_ALS_ITEMS or table.hashing is not None:
        return
    width = table.weight.shape[1]
    found = torch.zeros(table.rows, width, device=table.weight.device)
    if distributed.rank() == 0:
        vectors = item_vectors(dataset, width, length=INIT_STD * width**0.5, seed=config.seed)
        found.copy_(torch.from_numpy(vectors[: table.ids]))
    distributed.all_reduce_sum([found])
    table.weight.copy_(distributed.local_part(found) if isinstance(table, RowTable) else found)

"""Test the mean of two models, of whatever kind their tables are."""

from __future__ import annotations

import pytest
import torch

from twotower.models.layers.tables import RowTable, StoredTable, Table
from twotower.trainers.weight_mix import mix_weights
from twotower.utils.config import EmbeddingConfig


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("kind", [Table, RowTable])
def test_the_vectors_of_a_table_are_mixed_whatever_its_factor(kind: type[Table], share: float) -> None:
    torch.manual_seed(0)
    before, after, mixed = (kind("item.id", 20, 4, EmbeddingConfig()) for _ in range(3))
    torch.nn.init.normal_(after.weight)
    if isinstance(before, RowTable) and isinstance(after, RowTable):
        before.scale.fill_(0.9)
        after.scale.fill_(0.6)
    mixed.load_state_dict(mix_weights(before.state_dict(), after.state_dict(), share))
    old, new, found = (StoredTable(table).weight for table in (before, after, mixed))
    assert torch.allclose(found, old + share * (new - old), atol=1e-6)
    if share == 1:
        assert torch.equal(found, new)


def test_short_numbers_are_mixed_as_float32_and_whole_numbers_are_the_new_ones() -> None:
    before = {"w": torch.tensor([1.0], dtype=torch.bfloat16), "n": torch.tensor([3])}
    after = {"w": torch.tensor([1.0078125], dtype=torch.bfloat16), "n": torch.tensor([5])}
    found = mix_weights(before, after, 0.75)
    assert found["w"].dtype == torch.bfloat16 and float(found["w"]) == 1.0078125 and int(found["n"]) == 5

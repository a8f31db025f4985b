"""What encoding a micro-batch takes: bytes kept for the backward pass, a token, a vector, a field, and those on top for a moment.

Enters: `WorkloadSizes`, the settings. Leaves: bytes. Every coefficient has its reason beside it, and counts what the layers do:
who changes a layer changes its count (the tests compare them with what PyTorch keeps).
"""

from __future__ import annotations

import math

from twotower.data.views import OBJECTIVES
from twotower.features.batches import FieldSpec
from twotower.models.layers.embedding import GEO_SCALES_KM, GEO_WAVES
from twotower.trainers.memory.sizes import F32, ID, WorkloadSizes
from twotower.utils.config import Config, TowerConfig

GEO_FEATURES = 2 * len(GEO_SCALES_KM) * GEO_WAVES


def parts(workload: WorkloadSizes, config: Config, processes: int = 1) -> tuple[int, int]:
    """Micro-batches of the users and of the candidates; as the loader cuts them."""
    load, micro = workload.load, config.training.micro_batch_size
    if micro is None:
        return 1, 1
    size = load.slots if OBJECTIVES[config.training.objective].causal else load.examples
    most = max(load.members // processes, 1)
    cut = [math.ceil(math.ceil(n / processes) / micro) for n in (size, load.candidates)]
    return min(cut[0], most), min(cut[1], max(load.candidates // processes, 1))


def history_items(workload: WorkloadSizes, config: Config, processes: int = 1) -> int:
    """Distinct items of the histories of one micro-batch."""
    return min(workload.load.history_items, math.ceil(workload.load.slots / processes / parts(workload, config, processes)[0]))


def encoded(workload: WorkloadSizes, config: Config, wide: int, processes: int = 1) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of one micro-batch of users, and of one of candidates: bytes kept for the backward pass, and those on top for a moment."""
    load, model, layout = workload.load, config.model, workload.layout
    d, (of_users, of_items) = model.user_tower.width, parts(workload, config, processes)
    examples, slots = (math.ceil(n / processes / of_users) for n in (load.examples, load.slots))
    candidates = math.ceil(load.candidates / processes / of_items)
    blocks, last = history_bytes_a_slot(config, wide)
    read = history_items(workload, config, processes) * field_bytes(layout.item_fields, workload.bags, d, wide, static=True)
    kept, passing = head_bytes(2 + len(layout.user_fields), model.user_tower, wide)
    kept += field_bytes(layout.user_fields, workload.bags, d, wide)
    users = read + slots * blocks + examples * kept, max(slots * last, examples * passing)
    kept, passing = head_bytes(1 + len(layout.item_fields), model.item_tower, wide)
    kept += field_bytes(layout.item_fields, workload.bags, d, wide)
    return users, (candidates * kept, candidates * passing)


def history_bytes_a_slot(config: Config, wide: int) -> tuple[int, int]:
    """Bytes kept of a place of a history for the backward pass, and bytes that come on top of them for a moment."""
    tower = config.model.user_tower
    d = tower.width
    if not tower.blocks:
        return 0, 4 * F32 * d  # the tokens, their running sums by run and joined; going back, the gradients of the same
    # A block keeps its input and its middle (two norms read them); what matrix products read and write: both norms' outputs, q, k
    # and v, the mixed values as the attention made them and in a row, and twice the MLP's 4 d; a byte for each of two dropouts;
    # and a number for each head's softmax and of each norm's mean and deviation.
    block = 2 * F32 * d + 15 * wide * d + 2 * d * (tower.dropout > 0) + F32 * (tower.num_heads + 4)
    # Going back through an MLP: the gradient of what it adds, with and without dropout's factor, and of its middle.
    passing = 5 * F32 * d if wide == F32 else 4 * F32 * d
    if config.training.gradient_checkpointing:
        return tower.blocks * F32 * d, block + passing  # inputs alone; one block at a time is made again
    return tower.blocks * block, passing


def head_bytes(inputs: int, config: TowerConfig, wide: int) -> tuple[int, int]:
    """Bytes a vector keeps in a head, and those on top of them for a moment."""
    *hidden, out = config.layers
    d, dropping = config.width, config.dropout > 0
    width = inputs * d
    kept = F32 * 2 * out  # the vector before and after it has length one
    passing = 3 * F32 * width  # fields, stacked, and joined with the history's or state's; going back, their gradients
    if hidden:
        cross = config.cross_layers if config.interaction == "dcn" else 0
        # The fields; of each cross layer what its product read and wrote; half of the result is dropped: a byte each and the rest.
        kept += width * (F32 * (cross > 0) + 2 * cross * wide - (wide if cross else 0) + 1 + wide)
        kept += (F32 * width + (1 + 2 * wide) * d) * (config.interaction == "fm")
        kept += sum(h * (2 * wide + dropping) for h in hidden)  # before and after GELU
        passing += 3 * F32 * width * (cross > 0)
    return kept, passing


def field_bytes(specs: tuple[FieldSpec, ...], bags: dict[str, int], dim: int, wide: int, *, static: bool = False) -> int:
    """Bytes that embedding a row's fields keeps: a place's waves, and which row each id of a bag belongs to. `static`: for a
    history, whose tokens are the sum of an item's fields: these, their stack and its sum."""
    bag = sum(bags.get(spec.name, 1) * ID + 3 * ID for spec in specs if spec.kind == "bag")
    geo = sum(spec.kind == "geo" for spec in specs) * GEO_FEATURES * wide
    return bag + geo + (2 * (1 + len(specs)) * F32 * dim if static else 0)

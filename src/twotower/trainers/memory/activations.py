"""Estimate the memory of encoding a micro-batch: bytes kept for the backward pass, and temporary bytes on top.

Every coefficient is explained beside it and follows from the layers: after a change to a layer, update its count. The tests compare
the counts with what PyTorch keeps.
"""

from __future__ import annotations

import math

from twotower.data.views import OBJECTIVES
from twotower.features.batches import FieldSpec
from twotower.models.layers.embedding import GEO_SCALES_KM, GEO_WAVES
from twotower.trainers.memory.sizes import F32, ID, WorkloadSizes
from twotower.utils.config import ResolvedConfig, ResolvedTower

GEO_FEATURES = 2 * len(GEO_SCALES_KM) * GEO_WAVES


def parts(workload: WorkloadSizes, config: ResolvedConfig, processes: int = 1) -> tuple[int, int]:
    """Return the number of micro-batches of users and of candidates, as the loader splits them."""
    load, micro = workload.load, config.training.micro_batch_size
    if micro is None:
        return 1, 1
    size = load.slots if OBJECTIVES[config.training.objective].causal else load.examples
    most = max(load.members // processes, 1)
    cut = [math.ceil(math.ceil(n / processes) / micro) for n in (size, load.candidates)]
    return min(cut[0], most), min(cut[1], max(load.candidates // processes, 1))


def history_items(workload: WorkloadSizes, config: ResolvedConfig, processes: int = 1) -> int:
    """Return the number of distinct history items of one micro-batch."""
    return min(workload.load.history_items, math.ceil(workload.load.slots / processes / parts(workload, config, processes)[0]))


def encoded(
    workload: WorkloadSizes, config: ResolvedConfig, wide: int, processes: int = 1
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (bytes kept for the backward pass, temporary bytes) of one micro-batch of users, and of one of candidates."""
    load, model, layout = workload.load, config.model, workload.layout
    d, (of_users, of_items) = model.user_tower.embedding_dim, parts(workload, config, processes)
    examples, slots = (math.ceil(n / processes / of_users) for n in (load.examples, load.slots))
    candidates = math.ceil(load.candidates / processes / of_items)
    blocks, last = history_bytes_a_slot(config, wide)
    distinct = history_items(workload, config, processes)
    read = distinct * (field_bytes(layout.item_fields, workload.bags, wide) + F32 * d)  # with the sum of the fields
    kept, passing = head_bytes(2 + len(layout.user_fields), model.user_tower, wide)
    kept += field_bytes(layout.user_fields, workload.bags, wide)
    summed = distinct * (2 + len(layout.item_fields)) * F32 * d - slots * blocks - examples * kept  # before these exist
    users = read + slots * blocks + examples * kept, max(slots * last, examples * passing, summed)
    kept, passing = head_bytes(1 + len(layout.item_fields), model.item_tower, wide)
    kept += field_bytes(layout.item_fields, workload.bags, wide)
    return users, (candidates * kept, candidates * passing)


def history_bytes_a_slot(config: ResolvedConfig, wide: int) -> tuple[int, int]:
    """Return the bytes per history position that are kept for the backward pass, and the temporary bytes on top."""
    tower = config.model.user_tower
    d = tower.embedding_dim
    if not tower.num_blocks:
        return 0, 4 * F32 * d  # tokens, running sums per group and concatenated; in the backward pass their gradients
    # A block keeps its input and its middle (inputs of the two norms); inputs and outputs of matrix products: both norms' outputs,
    # q, k and v, the attention output in its own layout and as rows, and twice the MLP's 4 d; a byte for each of two dropouts;
    # and one number for each head's softmax and for each norm's mean and deviation.
    block = 2 * F32 * d + 15 * wide * d + 2 * d * (tower.dropout > 0) + F32 * (tower.num_heads + 4)
    # Backward pass of an MLP: the gradient of its output, with and without the dropout factor, and of its hidden layer.
    passing = 5 * F32 * d if wide == F32 else 4 * F32 * d
    if config.training.gradient_checkpointing:
        return tower.num_blocks * F32 * d, block + passing  # only the inputs are kept; one block at a time is recomputed
    return tower.num_blocks * block, passing


def head_bytes(inputs: int, config: ResolvedTower, wide: int) -> tuple[int, int]:
    """Return the bytes per vector that a head keeps for the backward pass, and the temporary bytes on top."""
    *hidden, out = config.hidden_dims
    d, dropping = config.embedding_dim, config.dropout > 0
    width = inputs * d
    kept = F32 * 2 * out  # the vector before and after normalisation
    passing = F32 * (width + 2 * d)  # the fields, and their running sum
    if hidden:
        passing = 3 * F32 * width  # the fields, stacked, and then their gradients
        cross = config.cross_layers if config.interaction == "dcn" else 0
        # The fields; input and output of each cross layer's product; dropout of the result: one byte each, and the result.
        kept += width * (F32 * (cross > 0) + 2 * cross * wide - (wide if cross else 0) + 1 + wide)
        kept += (F32 * width + (1 + 2 * wide) * d) * (config.interaction == "fm")
        kept += sum(h * (2 * wide + dropping) for h in hidden)  # before and after GELU
        passing += 3 * F32 * width * (cross > 0)
    return kept, passing


def field_bytes(specs: tuple[FieldSpec, ...], bags: dict[str, int], wide: int) -> int:
    """Return the bytes that embedding the fields of a row keeps: Fourier features of locations, and the row of each id in a bag."""
    bag = sum(bags.get(spec.name, 1) * ID + 3 * ID for spec in specs if spec.kind == "bag")
    geo = sum(spec.kind == "geo" for spec in specs) * GEO_FEATURES * wide
    return bag + geo

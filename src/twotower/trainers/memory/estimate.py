"""Estimate the memory of training by arithmetic, part by part. Every coefficient is explained beside it.

Nothing is allocated or measured. Only two values are calibrated: `BASE`, the memory of a process before any data, and `SLACK_*`,
the fragmentation of the C library's allocator within a step. That allocator also keeps freed memory. The estimate is for runs with
`training.memory_budget_gb`, which return it to the system (`hardware.trim_heap`). On a GPU the data stays in the host's memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from twotower.baselines.als import MAX_ALS_ITEMS, MAX_ALS_USERS
from twotower.evaluation.evaluator import QUERIES_AT_ONCE
from twotower.features.batches import FieldSpec
from twotower.models.neural_retriever import BLOCK as ENCODED
from twotower.search.index import BLOCK as SCORED
from twotower.search.index import BLOCK_BYTES as SCORED_BYTES
from twotower.trainers.calibration import MAX_CELLS
from twotower.trainers.health_measurements import BLOCK as SCORES
from twotower.trainers.health_measurements import SAMPLE
from twotower.trainers.history_weights import CHUNK_CELLS
from twotower.trainers.memory.activations import GEO_FEATURES, encoded, head_bytes, history_items, parts
from twotower.trainers.memory.sizes import F32, ID, BatchSizes, WorkloadSizes, row_bytes
from twotower.trainers.new_item_popularity import QUESTIONS, SIMULATED_SHARE
from twotower.trainers.optimizer import KEPT_NUMBERS
from twotower.utils.config import EmbeddingConfig, ResolvedConfig, ResolvedTower
from twotower.utils.losses import BLOCK as LOGITS

MB = 2**20
BASE = {"cpu": 512 * MB, "cuda": 1075 * MB}
"""CPU: measured for Python, PyTorch and the imports of training, after a few steps on tiny data. GPU: measured on an H100 with
CUDA 13, for its context with the kernels of a step (1,043 to 1,091 million bytes) and the workspace of cuBLAS (34)."""
GRAPH_COPIES = 2.6  # copies of the weights that the ONNX exporter makes (measured)
SLACK_SHARE, MAX_SLACK_BYTES = 0.5, 64 * MB
"""Calibrated on a CPU: share that the allocator loses between temporary blocks, and its maximum (glibc maps blocks from 32 MB on
separately, without loss). Also used for a GPU, where it was not measured."""
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
AHEAD = 4
"""Batches in memory at once: one in use, two in the queue, one waiting to enter it."""


@dataclass(frozen=True, slots=True)
class MemoryBreakdown:
    """Memory of one process in bytes, part by part.

    `activations` are those of one micro-batch. `opening` (loading the data), `validation`, `calibration` and `export` are used
    instead of gradients, activations and loss.
    """

    base: int
    data: int
    weights: int
    optimiser: int
    gradients: int
    activations: int
    loss: int
    batches: int
    opening: int
    validation: int
    calibration: int
    export: int

    @property
    def fixed(self) -> int:
        """Memory that is used throughout training."""
        return self.base + self.data + self.weights + self.optimiser

    @property
    def step(self) -> int:
        """Peak of a training step."""
        return self.fixed + self.gradients + self.activations + self.loss + self.batches

    @property
    def validating(self) -> int:
        """Peak of a validation, with the prefetched batches of the next steps."""
        return self.fixed + self.batches + self.validation

    @property
    def calibrating(self) -> int:
        """Peak of the calibration after the training."""
        return self.base + self.data + self.weights + self.calibration

    @property
    def peak(self) -> int:
        """Peak of a run."""
        opened = self.base + self.data + self.weights + self.opening
        return max(self.step, opened, self.validating, self.calibrating, self.base + self.export)


@dataclass(frozen=True, slots=True)
class Storage:
    """One table: rows, storage settings, rows that a step reads (per process), and number of uses in a step."""

    name: str
    rows: int
    config: EmbeddingConfig
    reads: int
    uses: int


def predict(
    workload: WorkloadSizes, config: ResolvedConfig, *, kind: str = "cpu", precision: str = "fp32", processes: int = 1
) -> MemoryBreakdown:
    """Return the memory of one of `processes` equal processes.

    Parameters
    ----------
    kind
        "cpu": main memory, with data and batches; "cuda": the memory of a GPU.
    precision
        Type of the matrix products: "fp32", "bf16" or "fp16".
    """
    dim, wide = config.model.user_tower.embedding_dim, WIDTH[precision]
    tables, other = storages(workload, config, processes), dense_numbers(workload, config)
    weights, optimiser = table_weights(tables, dim, processes) + F32 * other, table_state(tables, dim, processes) + 2 * F32 * other
    grown, kept, shared, read = table_gradients(tables, dim, kind)
    grown += F32 * other
    (users, users_on_top), (items, items_on_top) = encoded(workload, config, wide, processes)
    if parts(workload, config, processes) != (1, 1):
        # Gradients of earlier micro-batches exist beside the activations of a later one.
        work, gradients = max(users + users_on_top, items + items_on_top), grown + shared + 2 * read
    else:
        # Users are encoded first and back-propagated last, so their peak has no activations of candidates. Gradients of the tables
        # come after the activations are freed; those of tables that candidates read, while the users' activations still exist.
        work, gradients = kept + users + max(users_on_top, items + items_on_top), 2 * read
        work = max(work, (users if any(table.uses > 1 for table in tables) else 0) + grown + shared)
    work = max(work, grown + 4 * read)  # the update merges the rows' gradients: six copies, two of them already counted
    plain = table_weights([table for table in tables if table.config.update == "sparse"], dim, processes)
    host = kind == "cpu"
    return MemoryBreakdown(
        base=BASE[kind],
        data=workload.data_bytes + math.ceil(workload.shared_bytes / processes) if host else 0,
        weights=weights,
        optimiser=optimiser,
        gradients=gradients,
        activations=with_slack(work),
        loss=loss_bytes(workload.load, config, processes),
        batches=AHEAD * batch_bytes(workload, processes) + (making_bytes(workload.load) if host else 0),
        opening=max(workload.opening_bytes, beginning_bytes(workload, config)) if host else 0,
        validation=with_slack(validation_bytes(workload, config)),
        calibration=calibration_bytes(workload, config) if host else 0,
        export=export_bytes(weights, plain, optimiser, workload, config) if host else 0,
    )


def beginning_bytes(workload: WorkloadSizes, config: ResolvedConfig) -> int:
    """Return the memory of the iALS initialisation before the first step; 0 if there is none.

    It needs the item factors three times (computed, scaled, broadcast), the factors of the sampled users, all events with their
    weights, and the events of these users sorted by user and by item.
    """
    table = config.model.stored("item.id", workload.layout.items)
    hashed = table.max_rows is not None and workload.layout.items > table.max_rows
    if config.model.item_tower.id_init == "random" or workload.layout.items > MAX_ALS_ITEMS or hashed:
        return 0
    users = min(workload.layout.users, MAX_ALS_USERS)
    factors = F32 * config.model.user_tower.embedding_dim * (3 * workload.items + users)
    return factors + workload.trained * (3 * ID + F32) + 3 * (ID + F32) * workload.trained


def with_slack(size: int) -> int:
    """Return the memory for `size` bytes of temporary blocks, with fragmentation.

    Examples
    --------
    >>> with_slack(1000)
    1500
    """
    return size + min(int(SLACK_SHARE * size), MAX_SLACK_BYTES)


# Tables and other weights.


def storages(workload: WorkloadSizes, config: ResolvedConfig, processes: int = 1) -> list[Storage]:
    """Return every table of the model, once."""
    layout, load, model = workload.layout, workload.load, config.model
    share = math.ceil(load.examples / processes)
    listed = (
        math.ceil(load.candidates / processes) + history_items(workload, config, processes) * parts(workload, config, processes)[0]
    )
    per_table: dict[str, list[int]] = {}
    item_fields = (FieldSpec("id", "rows", (layout.items,), "item.id"), *layout.item_fields)
    user_fields = (FieldSpec("id", "rows", (layout.users,), "user.id"), *layout.user_fields)
    # The fields of items are read for histories and for candidates; those of users once.
    for specs, reads, uses in ((item_fields, listed, 2), (user_fields, share, 1)):
        for spec in specs:
            for name, rows in tables_of(spec):
                entry = per_table.setdefault(name, [rows, 0, 0])
                entry[1] += reads * (workload.bags.get(spec.name, 1) if spec.kind == "bag" else 1)
                entry[2] += uses
    found = []
    for name, (ids, reads, uses) in per_table.items():
        stored = model.stored(name, ids)
        rows = ids if stored.max_rows is None else min(ids, stored.max_rows)
        found.append(Storage(name, rows, stored, min(reads * (1 if rows == ids else 2), rows), uses))
    return found


def tables_of(spec: FieldSpec) -> list[tuple[str, int]]:
    """Return the names and numbers of ids of the tables that a field reads; [] for a dense field.

    Examples
    --------
    >>> tables_of(FieldSpec("city", "rows", (10,), "item.city"))
    [('item.city', 10)]
    """
    if spec.kind == "geo":
        return [(f"{spec.table}.{scale}", rows) for scale, rows in enumerate(spec.sizes)]
    return [] if spec.kind == "dense" else [(spec.table, spec.sizes[0])]


def rows_per_process(table: Storage, processes: int) -> int:
    """Return the rows of a table in one process: tables updated by rows are shared, the others are copied to every process."""
    return math.ceil(table.rows / processes) if table.config.update == "sparse" else table.rows


def table_weights(tables: list[Storage], dim: int, processes: int) -> int:
    """Return the bytes of the tables' weights."""
    return sum(rows_per_process(table, processes) * dim * WIDTH[table.config.dtype] for table in tables)


def table_state(tables: list[Storage], dim: int, processes: int) -> int:
    """Return the bytes of the optimiser state of the tables.

    Updated by rows: a second moment and the step of the last read, 4 bytes each. Dense: AdamW's two moments per number.
    """
    return sum(rows_per_process(table, processes) * (8 if table.config.update == "sparse" else 2 * F32 * dim) for table in tables)


def table_gradients(tables: list[Storage], dim: int, kind: str) -> tuple[int, int, int, int]:
    """Return four sizes in bytes: gradients of the dense tables, those kept, a second gradient, and one copy of the rows read.

    On a CPU, gradients are added in place, and large ones keep their memory between steps. On a GPU, the largest dense table with
    two uses in a step has two gradients before they are added. The rows are those of the tables updated by rows.
    """
    dense = [(table.rows * dim, table.uses) for table in tables if table.config.update == "dense"]
    kept = sum(numbers for numbers, _ in dense if numbers >= KEPT_NUMBERS) if kind == "cpu" else 0
    twice = max((numbers for numbers, uses in dense if uses > 1), default=0) if kind == "cuda" else 0
    read = sum(table.reads for table in tables if table.config.update == "sparse") * dim
    return F32 * sum(numbers for numbers, _ in dense), F32 * kept, F32 * twice, F32 * read


def dense_numbers(workload: WorkloadSizes, config: ResolvedConfig) -> int:
    """Return the number of weights outside the tables: attention (12 d² per block), heads, dense fields, positions."""
    user, item, layout = config.model.user_tower, config.model.item_tower, workload.layout
    d = user.embedding_dim
    dense = [spec.sizes[0] for spec in (*layout.item_fields, *layout.user_fields) if spec.kind == "dense"]
    heads = head_numbers(1 + len(layout.item_fields), item) + head_numbers(2 + len(layout.user_fields), user)
    return user.num_blocks * 12 * d * d + heads + d * (sum(dense) + GEO_FEATURES + user.max_history)


def head_numbers(inputs: int, config: ResolvedTower) -> int:
    """Return the number of weights of a head: a square matrix over all inputs per cross layer, then the MLP."""
    *hidden, out = config.hidden_dims
    if not hidden:
        return config.embedding_dim * out
    width = inputs * config.embedding_dim
    crossed = config.cross_layers * width**2 if config.interaction == "dcn" else 0
    return crossed + sum(a * b for a, b in zip([width, *hidden], [*hidden, out], strict=True)) + config.embedding_dim * out


# Loss, batches, validation, export.


def loss_bytes(load: BatchSizes, config: ResolvedConfig, processes: int) -> int:
    """Return the memory of the loss.

    It needs the vectors of the examples and of all candidates five times (computed, concatenated, their gradients, those times the
    upstream gradient, split), and the logits of a block of examples.
    """
    examples, dim = math.ceil(load.examples / processes), config.model.user_tower.hidden_dims[-1]
    block = min(max(LOGITS, load.candidates), examples * load.candidates)
    return 5 * F32 * dim * (examples + load.candidates) + F32 * block


def batch_bytes(workload: WorkloadSizes, processes: int = 1) -> int:
    """Return the memory of one batch from the loader.

    It has four integers per history position, the fields of items and users, and two integers per masked pair.
    """
    load, layout, bags = workload.load, workload.layout, workload.bags
    item, user = row_bytes(layout.item_fields, bags), row_bytes(layout.user_fields, bags)
    shared = load.slots * 4 * ID + load.examples * (user + 4 * ID) + (load.candidates * item) + load.masked * 2 * ID
    return math.ceil(shared / processes) + load.history_items * item + F32 * load.candidates


def making_bytes(load: BatchSizes) -> int:
    """Return the temporary memory while the loader builds a batch.

    It needs about fifteen integers per history position (event, validity, order by item …) and six for each event of the users
    (user, event, item, kept or not).
    """
    return 15 * ID * load.slots + 6 * ID * load.events


def validation_bytes(workload: WorkloadSizes, config: ResolvedConfig) -> int:
    """Return the memory of a validation, computed in fp32: the item vectors, and the maximum of four parts.

    The parts are: a batch of queries in an attention block (input, tokens, middle, norm, and 8 d in the MLP; without blocks, three
    running sums); a batch of items being encoded; a block of scores, with the vectors of items encoded as new; three copies of the
    scores of the health check. Without a validation part there is one calibration of new items, and no health check.
    """
    model, layout = config.model, workload.layout
    d, vectors = model.user_tower.embedding_dim, F32 * (model.user_tower.hidden_dims[-1] + 1) * workload.items
    judged = config.prepare.split.has_valid
    questions = min(QUERIES_AT_ONCE, max(config.training.eval_queries * judged, QUESTIONS))
    history = (12 * F32 if model.user_tower.num_blocks else 3 * F32) * d + 10 * ID
    waves = 3 * F32 * GEO_FEATURES * any(spec.kind == "geo" for spec in layout.item_fields)
    _, passing = head_bytes(1 + len(layout.item_fields), model.item_tower, F32)
    items = min(ENCODED, workload.items) * (passing + row_bytes(layout.item_fields, workload.bags) + waves)
    row = workload.items * F32
    scores = max(min(min(SCORED, questions) * row, SCORED_BYTES), row) + math.ceil(3 * SIMULATED_SHARE * vectors)
    health = judged * 3 * F32 * workload.items * min(max(SCORES // workload.items, 1), SAMPLE, questions)
    return vectors + max(int(questions * workload.question_slots * history), items, scores, health)


def calibration_bytes(workload: WorkloadSizes, config: ResolvedConfig) -> int:
    """Return the memory of the calibration; 0 without a validation part.

    It needs the scores of a sample of validation queries three times (kept, computed, divided by the temperature), and of a part of
    the queries three numbers of 4 bytes and two of 8 for each item.
    """
    if not config.prepare.split.has_valid or not config.model.popularity_prior:
        return 0
    cells = config.training.eval_queries * workload.items
    return 3 * F32 * min(MAX_CELLS, cells) + 28 * min(CHUNK_CELLS, cells)


def export_bytes(weights: int, plain: int, optimiser: int, workload: WorkloadSizes, config: ResolvedConfig) -> int:
    """Return the memory of the export after training: the data, which stays mapped, and the maximum of three parts.

    The parts are: a checkpoint and a new model; that model and two serialised copies; that model and its ONNX graphs, for which
    tables updated by rows are expanded (`plain` bytes).
    """
    vectors = F32 * (config.model.user_tower.hidden_dims[-1] + 1) * workload.items
    graphs = int((1 + GRAPH_COPIES) * weights) + plain
    return workload.data_bytes + workload.shared_bytes + max(2 * weights + optimiser, 3 * weights + vectors, graphs + vectors)

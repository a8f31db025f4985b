"""Run one process of TorchRec's table, sharded by row. Started by `sharding.py` with the Python of TorchRec.

An `EmbeddingCollection` with the fused kernel. Its optimiser is the one nearest to ours that fbgemm has on CPUs: row-wise Adagrad,
with one second moment per row and no momentum. fbgemm refuses Adam there, row-wise or not. TorchRec's own removal of duplicate ids
(`use_index_dedup`) has no CPU kernel either, so ids are made distinct before they are sent, as ours are.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402 - after the filters
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from fbgemm_gpu.split_embedding_configs import EmbOptimType  # noqa: E402
from sharding_worker import DIM, EPS, serve  # noqa: E402
from torch import Tensor  # noqa: E402
from torchrec.distributed import DistributedModelParallel  # noqa: E402
from torchrec.distributed.comm_ops import set_gradient_division  # noqa: E402
from torchrec.distributed.embedding import EmbeddingCollectionSharder  # noqa: E402
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise  # noqa: E402
from torchrec.distributed.types import ShardingEnv, ShardingPlan  # noqa: E402
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig  # noqa: E402
from torchrec.modules.embedding_modules import EmbeddingCollection  # noqa: E402
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor  # noqa: E402

DTYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}


class PeerShard:
    """TorchRec's table; see `sharding_worker.Shard`. `decay` is not used: row-wise Adagrad here has none."""

    def __init__(self, rows: int, dtype: str, rate: float, decay: float) -> None:  # noqa: ARG002 - one signature
        set_gradient_division(False)  # the gradients of the processes add up, they are not averaged
        table = EmbeddingConfig(name="table", num_embeddings=rows, embedding_dim=DIM, feature_names=["id"], data_type=DTYPES[dtype])
        module = EmbeddingCollection(tables=[table], device=torch.device("meta"))
        fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": rate, "eps": EPS}
        sharder = EmbeddingCollectionSharder(fused_params=fused)
        processes = dist.get_world_size()
        plan = construct_module_sharding_plan(
            module,
            {"table": row_wise(compute_kernel="fused")},
            sharder,
            local_size=processes,
            world_size=processes,
            device_type="cpu",
        )
        self.model = DistributedModelParallel(
            module, ShardingEnv.from_process_group(dist.group.WORLD), torch.device("cpu"), ShardingPlan(plan={"": plan}), [sharder],
            init_data_parallel=False,
        )  # fmt: skip
        (self.shard,) = next(iter(self.model.state_dict().values())).local_shards()

    def step(self, ids: Tensor, grad: Tensor) -> None:
        """Read, and update in the backward pass."""
        distinct, at = torch.unique(ids, return_inverse=True)
        lengths = torch.ones(len(distinct), dtype=torch.int64)
        found = self.model(KeyedJaggedTensor(["id"], distinct, lengths=lengths))["id"].values()
        torch.nn.functional.embedding(at, found).backward(grad)

    def set(self, whole: Tensor) -> None:
        """Set the weights."""
        numbers, _ = self.part()
        self.shard.tensor.copy_(whole[numbers])

    def part(self) -> tuple[Tensor, Tensor]:
        """Return the rows of this process."""
        first, count = self.shard.metadata.shard_offsets[0], self.shard.metadata.shard_sizes[0]
        return torch.arange(first, first + count), self.shard.tensor.float()

    def save(self, file: Path) -> None:
        """Write weights and moments with PyTorch's distributed checkpoint."""
        dcp.save(self._state(), checkpoint_id=file)

    def load(self, file: Path) -> None:
        """Restore weights and moments; each process reads its part."""
        state = self._state()
        dcp.load(state, checkpoint_id=file)
        self.model.load_state_dict(state["model"])
        self.model.fused_optimizer.load_state_dict(state["optimizer"])

    def _state(self) -> dict[str, object]:
        return {"model": self.model.state_dict(), "optimizer": self.model.fused_optimizer.state_dict()}


if __name__ == "__main__":
    serve(PeerShard)

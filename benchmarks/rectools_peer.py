"""Fit RecTools' SASRec or eSASRec, epoch after epoch, and write its lists. Run by `peers.py` with the Python of RecTools.

    PEER/.venv/bin/python benchmarks/rectools_peer.py FOLDER sasrec --factors 256

FOLDER/events.npz holds `user`, `item` and `split` (0 train, 1 validation, 2 test), int64 [T], by user, oldest event first. After
each epoch the 20 best items of every user, int64 [B, 20] with -1 where there are fewer, are written to FOLDER/MODEL-valid.npy, and
a JSON line {"epoch": 1, "seconds": 61.2, "cpu_s": 60.9} is printed: seconds and CPU seconds of training so far. The parent answers
"go", "test" (write FOLDER/MODEL-test.npy now) or "stop" on standard input.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from pathlib import Path

import numpy as np

warnings.filterwarnings("ignore")

K = 20


def main() -> None:
    """Fit, report and obey until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", choices=("sasrec", "esasrec"))
    parser.add_argument("--factors", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--history", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()

    import pandas as pd
    from lightning_fabric import seed_everything
    from pytorch_lightning import Trainer
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel
    from rectools.models.nn.transformers.ligr import LiGRLayers

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    seed_everything(given.seed, verbose=False)
    arrays = np.load(given.folder / "events.npz")
    user, item, split = arrays["user"], arrays["item"], arrays["split"]

    def dataset(parts: int) -> Dataset:
        """The events of the first parts; the day of an event is its position, so that the order stays."""
        kept = np.flatnonzero(split < parts)
        days = pd.to_datetime(np.arange(len(kept)) // 1000, unit="D") + pd.to_timedelta(np.arange(len(kept)) % 1000, unit="s")
        columns = {Columns.User: user[kept], Columns.Item: item[kept], Columns.Weight: 1, Columns.Datetime: days}
        return Dataset.construct(pd.DataFrame(columns))

    def quiet_trainer() -> Trainer:
        options = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
        return Trainer(max_epochs=1, accelerator="gpu" if given.device == "cuda" else "cpu", devices=1, **options)

    ligr = {"transformer_layers_type": LiGRLayers} if given.model == "esasrec" else {}
    model = SASRecModel(
        n_blocks=given.blocks, n_heads=given.heads, n_factors=given.factors, dropout_rate=given.dropout,
        session_max_len=given.history, lr=1e-3, batch_size=128, loss="sampled_softmax", n_negatives=256,
        get_trainer_func=quiet_trainer, verbose=0, **ligr,
    )  # fmt: skip

    def write(part: str, known: Dataset) -> None:
        """Write the lists of all users."""
        users = np.unique(user)
        found = model.recommend(users=users, dataset=known, k=K, filter_viewed=True, on_unsupported_targets="ignore")
        lists = np.full((int(users.max()) + 1, K), -1, np.int64)
        lists[found[Columns.User].to_numpy(), found[Columns.Rank].to_numpy() - 1] = found[Columns.Item].to_numpy()
        np.save(given.folder / f"{given.model}-{part}.npy", lists)

    train, until_valid = dataset(1), dataset(2)
    seconds, cpu_s, epoch = 0.0, 0.0, 0
    while True:
        began, cpu_began = time.perf_counter(), time.process_time()
        model.fit_partial(train, min_epochs=1, max_epochs=1)
        seconds, cpu_s, epoch = seconds + time.perf_counter() - began, cpu_s + time.process_time() - cpu_began, epoch + 1
        write("valid", train)
        sys.stdout.write(json.dumps({"epoch": epoch, "seconds": round(seconds, 2), "cpu_s": round(cpu_s, 2)}) + "\n")
        sys.stdout.flush()
        order = sys.stdin.readline().strip()
        if order == "test":
            write("test", until_valid)
            sys.stdout.write("{}\n")
            sys.stdout.flush()
            order = sys.stdin.readline().strip()
        if order != "go":
            return


if __name__ == "__main__":
    main()

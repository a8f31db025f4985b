"""Test the predicted time: it follows the work, holds for what was measured on a GPU, and the plan shows it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from twotower.cli import main
from twotower.features.batches import FieldSpec, Layout
from twotower.trainers.memory.duration import (
    GPUS,
    Processor,
    StepWork,
    cpu_at_hand,
    hours,
    kaggle_line,
    step_seconds,
    step_work,
    steps_of,
)
from twotower.trainers.memory.plan import DEVICES
from twotower.trainers.memory.sizes import BatchSizes, WorkloadSizes, yelp_sizes
from twotower.utils.config import ResolvedConfig, parse_config

H100, H200 = (next(one for one in GPUS if one.name == name) for name in ("H100", "H200"))
NEIGHBOURS = FieldSpec("neighbours", "bag", (40_000,), "item.id")
CLOCK = tuple(FieldSpec(name, "rows", (26,), name) for name in ("hour", "weekday", "month"))
TOWN_ITEM = (
    FieldSpec("categories", "bag", (30,), "item.categories"),
    FieldSpec("attributes", "bag", (20,), "item.attributes"),
    FieldSpec("price", "rows", (6,), "item.price"),
    FieldSpec("city", "rows", (10,), "item.city"),
    FieldSpec("location", "geo", (200, 900), "item.location"),
    FieldSpec("hours", "dense", (168,), "item.hours"),
    FieldSpec("text", "dense", (32,), "item.text"),
    NEIGHBOURS,
    FieldSpec("state", "dense", (5,), "item.state"),
)
TOWN_USER = (FieldSpec("state", "dense", (7,), "user.state"), FieldSpec("home", "geo", (200, 900), "item.location"), *CLOCK)
STATE = (FieldSpec("state", "dense", (3,), "user.state"),)
S3REC_ITEM = (FieldSpec("categories", "bag", (1000,), "item.categories"), NEIGHBOURS)


def config(width: int, blocks: int, **training: Any) -> ResolvedConfig:
    tower = {"embedding_dim": width}
    values = {"model": {"user_tower": {**tower, "num_blocks": blocks}, "item_tower": tower}, "training": training}
    return parse_config(values).resolved(ordered=True, timed=True, events=100_000, ids=10_000)


def sizes(items: int, users: int, fields: tuple[Any, Any], load: BatchSizes) -> WorkloadSizes:
    form = Layout(items=items, users=users, event_types=3, item_fields=fields[0], user_fields=fields[1], ordered=True)
    bags = {"categories": 3, "attributes": 8, "neighbours": 20}
    more = {"data_bytes": 10**7, "shared_bytes": 10**7, "opening_bytes": 10**7, "question_slots": 20.0, "trained": 100_000}
    return WorkloadSizes(layout=form, items=items, bags=bags, load=load, **more)


# Sizes of the datasets of benchmarks/results/gpu.jsonl, and what was measured: a step in training (512 examples by the examples per
# second) and the launches of a step.
MEASURED = {
    "town": (
        128,
        1,
        sizes(1_502, 3_002, (TOWN_ITEM, TOWN_USER), BatchSizes(517, 14688, 517, 1243, 1132, 22492, 32052)),
        26.27,
        845,
    ),
    "s3rec": (128, 0, sizes(20_035, 30_433, (S3REC_ITEM, STATE), BatchSizes(513, 6734, 513, 3882, 2402, 1387, 11157)), 12.71, 406),
    "yelp2018": (
        256,
        0,
        sizes(38_050, 31_670, ((NEIGHBOURS,), STATE), BatchSizes(513, 15694, 513, 9401, 2487, 3678, 40221)),
        13.83,
        357,
    ),
}


# Steps on one thread of a CPU whose probe gives 113 GFLOP/s and 10.6 GB/s: processor time in ms.
ON_A_CPU = {
    "S3-Rec's Yelp, any event": (StepWork(1.236e09, 2.764e08, 1.322e08, 388, 0, 0), 48),
    "S3-Rec's Yelp, next event": (StepWork(4.97e10, 1.147e09, 3.299e08, 508, 0, 0), 588),
    "Toys, any event": (StepWork(1.188e09, 1.846e08, 1.257e08, 388, 0, 0), 39),
    "Toys, next event": (StepWork(4.142e10, 9.248e08, 3.389e08, 508, 0, 0), 455),
    "town, any event": (StepWork(2.077e10, 5.504e08, 1.541e08, 868, 0, 0), 333),
    "town, next event": (StepWork(2.588e10, 6.043e08, 1.969e08, 928, 0, 0), 305),
    "yelp2018, any event": (StepWork(3.145e09, 7.192e08, 2.562e08, 340, 0, 0), 126),
    "size of Yelp's dump, any event": (StepWork(5.882e09, 7.898e08, 1.138e08, 868, 0, 0), 143),
    "size of Yelp's dump, next event": (StepWork(7.442e10, 1.99e09, 5.986e08, 928, 0, 0), 1025),
}


H200_MS = {"town": 31.09, "s3rec": 16.61, "yelp2018": 16.45}


@pytest.mark.parametrize("name", MEASURED)
def test_the_prediction_holds_within_30_percent_on_an_h100_and_an_h200(name: str) -> None:
    width, blocks, found, step_ms, launches = MEASURED[name]
    work = step_work(found, config(width, blocks), precision="bf16")
    assert 1000 * step_seconds(work, H100) == pytest.approx(step_ms, rel=0.3)
    assert 1000 * step_seconds(work, H200) == pytest.approx(H200_MS[name], rel=0.31)
    assert work.launches == pytest.approx(launches, rel=0.3)


@pytest.mark.parametrize("name", ON_A_CPU)
def test_the_prediction_holds_within_30_percent_on_a_cpu(name: str) -> None:
    work, step_ms = ON_A_CPU[name]
    assert 1000 * step_seconds(work, Processor("cpu", 113e9, 10.6e9)) == pytest.approx(step_ms, rel=0.3)


def test_the_time_follows_the_work() -> None:
    small = config(128, 1, batch_size=512)
    found = yelp_sizes(100_000, 10_000, 1_000_000, small)
    base, slow = step_work(found, small), Processor("cpu", 50e9, 10e9)
    for changed, settings in (
        (config(256, 1, batch_size=512), {}),
        (config(128, 3, batch_size=512), {}),
        (config(128, 1, batch_size=512, micro_batch_size=128), {}),
    ):
        more = step_work(yelp_sizes(100_000, 10_000, 1_000_000, changed), changed, **settings)
        assert more.flops > base.flops and step_seconds(more, slow) > step_seconds(base, slow)
    large = config(128, 1, batch_size=8192)
    of_large = step_work(yelp_sizes(100_000, 10_000, 1_000_000, large), large, precision="bf16")
    per_example = [step_seconds(one, H100) / size for one, size in ((base, 512), (of_large, 8192))]
    assert per_example[1] < per_example[0] / 2, "larger batches use a GPU better"
    half = step_work(found, small, processes=2)
    assert half.flops < base.flops and half.reduced > base.reduced == 0
    assert steps_of(found, small).total_steps == 4 * -(-1_000_000 // 512)


def test_this_cpu_is_measured() -> None:
    here = cpu_at_hand()
    assert 1e8 < here.flops_s < 1e14 and 1e8 < here.bytes_s < 1e13 and here.measured


def test_a_session_of_kaggle_fits_or_does_not() -> None:
    small = config(128, 1, batch_size=512)
    assert kaggle_line(yelp_sizes(20_000, 5_000, 200_000, small), small, 1_000).endswith("fits.")
    assert kaggle_line(yelp_sizes(20_000, 5_000, 200_000, small), small, 10**9).endswith("does not fit.")
    huge = yelp_sizes(100_000_000, 10_000_000, 1_000_000_000, small)
    assert kaggle_line(huge, small, 1_000).endswith("does not fit."), "main memory"


def test_the_plan_shows_hours_beside_gigabytes(capsys: Any) -> None:
    assert main(["plan", "--users", "100000", "--items", "10000", "--events", "1000000", "--device", "H100"]) == 0
    said = capsys.readouterr().out
    for name in ("this CPU", *DEVICES):
        assert re.search(rf"^  {name}.* \d+ ms +[\d.]+ (min|h)", said, re.M), name
    assert said.count("not measured") == 3 and re.search("budget +80.00 GB", said)
    assert re.search(r"^A session of Kaggle \(T4 ×2, 12 h, 30 GB\): .* fits\.$", said, re.M)
    assert hours(59 * 60) == "59.0 min"

"""Test the memory plan: its counts, its order of changes, its errors, and that training follows it."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from twotower.cli import main
from twotower.errors import TrainingError
from twotower.models.layers.attention import AttentionBlock
from twotower.models.towers.head import TowerHead
from twotower.trainers.memory.activations import head_bytes, history_bytes_a_slot
from twotower.trainers.memory.estimate import predict
from twotower.trainers.memory.plan import DEVICES, GB, Machine, human, is_out_of_memory, make_plan
from twotower.trainers.memory.sizes import OWN_EVENT, yelp_sizes
from twotower.utils.checkpoint import load_checkpoint
from twotower.utils.config import ResolvedConfig, load_config, parse_config


def yelp(values: dict[str, Any]) -> ResolvedConfig:
    """Return settings with the sizes that seven million events give them."""
    return parse_config(values).resolved(ordered=True, timed=True, events=7_000_000, ids=2_150_000)


LARGE = yelp({"model": {"user_tower": {"embedding_dim": 128}}, "training": {"batch_size": 8192}})


def workload(users: int = 2_000_000, items: int = 150_000, config=LARGE):
    return yelp_sizes(users, items, 7_000_000, config)


def test_more_rows_take_more_and_more_processes_less_each():
    small, large = (predict(workload(users=n), LARGE).peak for n in (1_000_000, 4_000_000))
    assert small < large
    whole, half = (predict(workload(), LARGE, processes=n) for n in (1, 2))
    assert half.weights < whole.weights
    assert whole.data - half.data == 7_000_000 * OWN_EVENT / 2, "each reads the histories of its own users"


def test_new_items_are_queried_without_a_validation_part():
    found, config = workload(items=50_000_000), yelp({"prepare": {"split": {"valid": 0.0}}})
    assert 0 < predict(found, config).validation <= predict(found, yelp({})).validation


def test_a_row_updated_alone_has_eight_bytes_of_state_and_a_dense_one_two_moments():
    dense = yelp(
        {"model": {"sparse_update_from_rows": 10**9, "user_tower": {"embedding_dim": 128}}, "training": {"batch_size": 8192}}
    )
    gap = predict(workload(config=dense), dense).optimiser - predict(workload(), LARGE).optimiser
    assert gap == pytest.approx(2_000_002 * (2 * 4 * 128 - 8), rel=0.01)


def test_the_cheapest_change_in_time_comes_first():
    """Recomputing attention or both towers comes before another storage of the tables."""
    found = workload()
    peak = predict(found, LARGE, kind="cuda", precision="fp16").peak
    asked = [make_plan(found, LARGE, Machine("cuda", int(peak * share), "fp16")).settings for share in (1.0, 0.95, 0.6)]
    assert asked[0] == ()
    assert len(asked[1]) == 1 and "model.tables" not in asked[1][0]
    assert any("micro_batch_size" in setting for setting in asked[2])
    assert not any("training.batch_size" in setting for settings in asked for setting in settings)


def taken_up(advice: str, machine: Machine, config: ResolvedConfig) -> tuple[str, Machine, ResolvedConfig]:
    """Return the kind of change that the error suggests, and the machine and settings after it."""
    values = config.model_dump(mode="json")
    if found := re.search(r"Train with (\d+) processes", advice):
        return "processes", replace(machine, processes=int(found[1])), config
    if found := re.search(r"Use a budget of at least ([\d.]+) GB", advice):
        return "budget", replace(machine, budget=math.ceil(float(found[1]) * GB * 1.01)), config
    if found := re.search(r"max_rows: (\d+) for (\S+) in", advice):
        values["model"]["tables"][found[2]] = {"update": "sparse", "dtype": "fp16", "max_rows": int(found[1])}
        return "max_rows", machine, yelp(values)
    found = re.search(r"--set training\.(\w+)=(\d+)\.$", advice)
    assert found, advice
    values["training"][found[1]] = int(found[2])
    return found[1], machine, yelp(values)


@pytest.mark.parametrize(
    ("users", "items", "budget_gb", "kind"),
    [
        (20_000_000, 150_000, 3.6, "max_rows"),
        (20_000_000, 150_000, 2.4, "processes"),
        (20_000_000, 150_000, 0.9, "budget"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_change_that_would(users, items, budget_gb, kind):
    machine = Machine("cuda", int(budget_gb * GB), "fp16")
    with pytest.raises(TrainingError, match=r"does not fit into .*It takes .*even with") as refusal:
        make_plan(workload(users, items), LARGE, machine)
    named, machine, config = taken_up(str(refusal.value), machine, LARGE)
    assert named == kind, str(refusal.value)
    assert make_plan(workload(users, items, config), config, machine).parts.peak <= machine.budget


def test_the_plans_that_the_manual_shows_are_those_that_are_made():
    page = (Path(__file__).parents[3] / "docs" / "method.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines()]
    shown = {cells[1].strip(): [cell.strip() for cell in cells[2:5]] for cells in rows if len(cells) == 6}
    yelp, sizes = load_config(None, []), (1_987_897, 150_346, 6_990_280)
    wide = load_config(None, ["model.user_tower.embedding_dim=256"])
    huge, t4, p100 = (10**8, 10**7, 10**9), DEVICES["T4"], DEVICES["P100"]
    machines = [(yelp, sizes, t4, 1), (wide, sizes, p100, 1), (yelp, huge, t4, 16)]
    for column, (config, (users, items, events), budget, processes) in enumerate(machines):
        resolved = config.resolved(ordered=True, timed=True, events=events, ids=users + items)
        parts = make_plan(yelp_sizes(users, items, events, config), resolved, Machine("cuda", budget, "fp16", processes)).parts
        each = " each" if processes > 1 else ""
        assert shown["weights"][column] == human(parts.weights) + each
        assert shown["optimiser"][column] == human(parts.optimiser)
        assert shown["activations"][column] == human(parts.activations)
        assert shown["loss and gradients"][column] == human(parts.loss + parts.gradients)
        assert shown["base process, prefetched batches"][column] == human(parts.base + parts.data + parts.batches)
        assert shown["a training step at its peak"][column] == human(parts.step)
        assert shown["validation"][column] == human(parts.validating)


def test_the_command_prints_the_plan_and_refuses(capsys):
    sizes = ["--users", "2000000", "--items", "150000", "--events", "7000000"]
    assert main(["plan", *sizes, "--device", "T4"]) == 0
    shown = capsys.readouterr().out
    for part in ("weights", "optimiser", "gradients", "activations", "loss", "data", "peak", "15.00 GB"):
        assert part in shown
    assert main(["plan", *sizes, "--budget", "0.1"]) == 2
    assert "Training does not fit into 100 MB" in capsys.readouterr().err
    assert main(["plan", "--users", "5"]) == 2
    assert "Give --data" in capsys.readouterr().err


def test_training_refuses_a_budget_it_cannot_keep(town, tmp_path, capsys):
    given = ["train", "--data", str(town.folder), "--out", str(tmp_path), "--set", "training.memory_budget_gb=0.2"]
    assert main(given) == 2
    assert "Training does not fit into 200 MB" in capsys.readouterr().err


def test_training_keeps_to_the_plan(town, tmp_path):
    given = ["train", "--data", str(town.folder), "--out", str(tmp_path), "--set", "training.max_steps=4"]
    assert main([*given, "--set", "training.memory_budget_gb=4", "--set", "training.batch_size=64"]) == 0
    assert (tmp_path / "bundle" / "manifest.json").is_file()


def test_errors_of_allocators_are_recognised():
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    )
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def kept_bytes(layer, x, *more):
    """Return the bytes that PyTorch keeps for a layer's backward pass, without its weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = layer(x, *more)
    return out, sum(size for _, size in kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("causal", [True, False])
def test_a_block_keeps_what_is_counted_for_it(dropout, causal):
    config = parse_config({"model": {"user_tower": {"dropout": dropout, "num_blocks": 1, "embedding_dim": 128}}})
    block, x = AttentionBlock(128, 4, dropout), torch.randn(1000, 128, requires_grad=True)
    _, kept = kept_bytes(block, x, torch.ones(1000, dtype=torch.bool), ((20, 50),), causal)
    assert history_bytes_a_slot(config, 4)[0] == pytest.approx(kept / 1000, rel=0.01)


@pytest.mark.parametrize("interaction", ["dcn", "fm", "none"])
@pytest.mark.parametrize("hidden", [[64], [128, 64], [128, 96, 64]])
def test_a_head_keeps_what_is_counted_for_it(interaction, hidden):
    tower = {"hidden_dims": hidden, "interaction": interaction, "embedding_dim": 64}
    config = yelp({"model": {"user_tower": tower, "item_tower": tower}}).model.user_tower
    vectors, kept = kept_bytes(TowerHead(9, config), torch.randn(1000, 9, 64, requires_grad=True).unbind(dim=1))
    assert head_bytes(9, config, 4)[0] == pytest.approx((kept + vectors.nbytes) / 1000, rel=0.02)  # the loss keeps the vectors


def test_a_micro_batch_takes_less_and_checkpointing_less_of_many_blocks():
    def work(**values):
        config = yelp({"model": {"user_tower": {"num_blocks": 4}}, "training": {"batch_size": 8192, **values}})
        return predict(workload(config=config), config).activations

    assert work(micro_batch_size=512) < work(gradient_checkpointing=True) < work()


def test_the_settings_of_a_plan_can_be_set_by_hand():
    """The `--set` arguments of a plan give the settings of the plan."""
    found = workload()
    peak = predict(found, LARGE).peak
    plan = make_plan(found, LARGE, Machine("cpu", int(0.6 * peak)))
    assert any("tables" in line for line in plan.settings)
    by_hand = [re.sub(r"^--set '?|'$", "", line) for line in plan.settings]
    asked = load_config(None, ["training.batch_size=8192", "model.user_tower.embedding_dim=128", *by_hand])
    assert yelp(asked.model_dump(mode="json")) == plan.config


STARVED = """
import resource, sys
from twotower.cli import main
from twotower.utils.hardware import status
from twotower.trainers.two_tower_trainer import TwoTowerTrainer
step = TwoTowerTrainer._step
def starve(self, batch):
    if self.state.step >= 1:
        size = status("VmSize") + 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, -1))
    step(self, batch)
TwoTowerTrainer._step = starve
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_that_memory_ends_names_what_would_have_fitted_and_keeps_its_checkpoint(town, tmp_path):
    """Limit the address space after a step, so that allocations really fail.

    It must happen in the same epoch: the next one starts a new thread, and without memory for it the C library ends the process.
    """
    small = ("model.user_tower", "model.item_tower")
    settings = [f"{tower}.{width}" for tower in small for width in ("embedding_dim=64", "hidden_dims=[64]")]
    settings += [
        "training.batch_size=2048",
        "training.device=cpu",
        "training.checkpoint_every_s=0.001",
        "training.eval_every_epochs=100",
    ]
    given = [part for setting in (*settings, "training.eval_queries=100", "training.max_steps=100") for part in ("--set", setting)]
    command = [sys.executable, "-c", STARVED, "train", "--data", str(town.folder), "--out", str(tmp_path / "run"), *given]
    mapped = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # the C library keeps nothing that a step could find room in
    ended = subprocess.run(command, env=mapped, capture_output=True, text=True, timeout=300, check=False)
    said = ended.stderr.splitlines()[-1]
    assert ended.returncode == 2, ended.stderr
    assert "Training ran out of memory" in said
    assert re.search(r"--set training\.memory_budget_gb=[\d.]+ --set training\.micro_batch_size=\d+", said)
    assert "last.pt, is intact" in said
    assert 1 <= load_checkpoint(tmp_path / "run" / "last.pt")["progress"]["step"] < 100

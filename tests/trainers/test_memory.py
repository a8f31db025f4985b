"""The memory plan: what it counts, what it chooses first, what it refuses, and that training does as it says."""

from __future__ import annotations

import pytest

from twotower.cli import main
from twotower.config import parse_config
from twotower.errors import TrainingError
from twotower.trainers.budget import GB, Machine, is_out_of_memory, make_plan
from twotower.trainers.facts import facts_from_sizes
from twotower.trainers.memory import predict

LARGE = parse_config({"training": {"batch_size": 8192}})


def facts(users: int = 2_000_000, items: int = 150_000, config=LARGE):
    return facts_from_sizes(users, items, 7_000_000, config)


def test_more_rows_take_more_and_more_processes_less_each():
    small, large = (predict(facts(users=n), LARGE).peak for n in (1_000_000, 4_000_000))
    assert small < large
    whole, half = (predict(facts(), LARGE, processes=n).weights for n in (1, 2))
    assert half < whole


def test_a_row_updated_alone_has_eight_bytes_of_state_and_a_dense_one_two_moments():
    dense = parse_config({"model": {"rows_from": 10**9}, "training": {"batch_size": 8192}})
    gap = predict(facts(config=dense), dense).optimiser - predict(facts(), LARGE).optimiser
    assert gap == pytest.approx(2_000_002 * (2 * 4 * 64 - 8), rel=0.01)


def test_the_cheapest_change_in_time_comes_first():
    """Attention or both towers a second time before the storage of the tables."""
    found = facts()
    peak = predict(found, LARGE, kind="cuda", precision="fp16").peak
    asked = [make_plan(found, LARGE, Machine("cuda", int(peak * share), "fp16")).settings for share in (1.0, 0.95, 0.6)]
    assert asked[0] == ()
    assert len(asked[1]) == 1 and "model.tables" not in asked[1][0]
    assert any("micro_batch" in setting for setting in asked[2])
    assert not any("batch_size" in setting for settings in asked for setting in settings)


def test_what_cannot_fit_is_refused_with_the_change_that_would():
    with pytest.raises(TrainingError, match=r"must fit into 1\.\d\d GB.*(max_rows|batch_size|processes)"):
        make_plan(facts(users=100_000_000), LARGE, Machine("cuda", int(1.2 * GB), "fp16"))


def test_the_command_prints_the_plan_and_refuses(capsys):
    sizes = ["--users", "2000000", "--items", "150000", "--events", "7000000"]
    assert main(["plan", *sizes, "--device", "T4"]) == 0
    shown = capsys.readouterr().out
    for part in ("weights", "optimiser", "gradients", "activations", "loss", "data", "peak", "15.00 GB"):
        assert part in shown
    assert main(["plan", *sizes, "--budget", "0.1"]) == 2
    assert "Training must fit into 100 MB" in capsys.readouterr().err
    assert main(["plan", "--users", "5"]) == 2
    assert "needs --data" in capsys.readouterr().err


def test_training_refuses_a_budget_it_cannot_keep(town, tmp_path, capsys):
    given = ["train", "--data", str(town.folder), "--out", str(tmp_path), "--set", "training.memory_budget_gb=0.2"]
    assert main(given) == 2
    assert "Training must fit into 200 MB" in capsys.readouterr().err


def test_training_keeps_to_the_plan(town, tmp_path):
    given = ["train", "--data", str(town.folder), "--out", str(tmp_path), "--set", "training.max_steps=4"]
    assert main([*given, "--set", "training.memory_budget_gb=4", "--set", "training.batch_size=64"]) == 0
    assert (tmp_path / "bundle" / "manifest.json").is_file()


def test_errors_of_allocators_are_told_from_others():
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    )
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))

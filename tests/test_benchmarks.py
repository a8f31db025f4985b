"""The scripts in benchmarks/: rows that machines can read, and a page that says what the rows say."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from twotower.pipeline.stages import simulate_stage
from twotower.utils.config import load_config

ROOT = Path(__file__).parents[1]
TINY = ["--users", "60", "--businesses", "50", "--events", "1200", "--quiet"]
SMALL = [
    "model.user_tower.embedding_dim=8",
    "model.item_tower.embedding_dim=8",
    "prepare.text_dim=0",
    "training.num_epochs=1",
    "evaluation.baselines=[popular, item_knn]",
    "evaluation.tune_baselines=false",
    "evaluation.bootstrap_resamples=20",
]
KEYS = {"set", "protocol", "system", "metrics", "seed", "machine", "commit", "seconds", "config_hash"}


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The modules, imported as when a script of the folder runs."""
    names = (
        "common",
        "report",
        "quality",
        "quality_over_time",
        "ablation",
        "peers",
        "index",
        "large_index",
        "full_run",
        "large_bundle",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def measured(scripts: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows of one tiny town, and what the run left."""
    folder = tmp_path_factory.mktemp("quality")
    settings = [word for setting in SMALL for word in ("--set", setting)]
    places = ["--results", str(folder / "quality.jsonl"), "--out", str(folder)]
    assert scripts.quality.main(["town", "--seeds", "3", *TINY, *settings, *places]) == 0
    return folder


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def validations(file: Path) -> list[float]:
    return [row["NDCG@10"] for row in lines(file) if "NDCG@10" in row]


def row(system: str, seed: int, ndcg: float, low: float = 0.0, high: float = 0.0, **more: Any) -> dict[str, Any]:
    """A row as `quality.py` writes them."""
    ahead = None if system == "two-tower" else {"metric": "NDCG@10", "value": (low + high) / 2, "low": low, "high": high}
    fixed = {"set": "town", "protocol": "masked", "machine": "1 core", "commit": "c0ffee", "seconds": 1.0, "config_hash": "new"}
    return {**fixed, "system": system, "seed": seed, "metrics": {"NDCG@10": ndcg}, "ahead": ahead, **more}


def page(scripts: SimpleNamespace, folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "quality.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    text: str = scripts.report.render(folder)
    return text


def test_a_row_for_each_system_holds_what_the_report_says(measured: Path) -> None:
    rows, report = lines(measured / "quality.jsonl"), json.loads((measured / "town-3" / "report.json").read_text())
    named = {"two-tower", "two-tower, refreshed every 7 days", "popular", "item_knn", "oracle"}
    assert {each["system"] for each in rows} == named == set(report["systems"])
    for each in rows:
        assert set(each) >= KEYS
        figures = {name: figure["value"] for name, figure in report["systems"][each["system"]].items()}
        assert each["metrics"] == figures | report["beyond"][each["system"]]
        assert (each["set"], each["protocol"], each["seed"]) == ("town", "masked", 3)
        difference = report["differences"].get(each["system"])
        assert each["ahead"] == (difference and {"metric": "NDCG@10", **difference["NDCG@10"]})
        assert ("slices" in each) == (each["system"] == "two-tower") and each["peak_gib"] > 0
    assert rows[0]["system"] == "oracle", "best first; nothing beats the truth of the town"


def test_rows_are_printed_as_they_are_kept(scripts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        scripts.common.tell({"system": "é", "seed": number}, tmp_path / "new" / "rows.jsonl")
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines(tmp_path / "new" / "rows.jsonl")


def test_no_row_tells_where_it_was_measured(measured: Path, scripts: SimpleNamespace) -> None:
    text = (measured / "quality.jsonl").read_text()
    assert str(measured) not in text and str(ROOT) not in text
    assert scripts.common.machine("Tesla T4").endswith(" GiB, Tesla T4")


def test_rows_name_the_processor(scripts: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    assert scripts.common.processor(file) == "unknown processor"
    file.write_text(
        "processor\t: 0\nmodel name\t: A B\nflags\t\t: fpu avx avx2 avx512f amx_tile\n\nprocessor\t: 1\nmodel name\t: A B\n"
    )
    assert scripts.common.processor(file) == "A B with AVX2, AVX-512, AMX"
    assert scripts.common.machine().endswith(f" GiB, {scripts.common.processor()}")


def test_the_hash_stands_for_the_settings_alone(scripts: SimpleNamespace) -> None:
    def of(*settings: str, users: int = 1) -> str:
        found: str = scripts.quality.config_hash(load_config(None, list(settings)), {"users": users})
        return found

    assert of() == of("seed=5") == of("data.path=elsewhere")
    assert len({of(), of("training.num_epochs=2"), of("data.events=[tip]"), of(users=2)}) == 4


def test_real_sets_need_the_real_data(
    scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TWOTOWER_DATA", raising=False)
    assert scripts.quality.main(["s3rec", "--results", str(tmp_path / "rows.jsonl")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "TWOTOWER_DATA" in said[0]
    assert not (tmp_path / "rows.jsonl").exists()


def test_every_set_has_a_configuration(scripts: SimpleNamespace) -> None:
    for chosen in scripts.common.QUALITY_SETS.values():
        load_config(ROOT / "configs" / chosen.config, list(chosen.settings))
    assert scripts.common.QUALITY_SETS["s3rec-unmasked"].settings == ("evaluation.exclude_seen=false",)


def test_a_table_of_seeds_by_hand(scripts: SimpleNamespace, tmp_path: Path) -> None:
    rows = [row("two-tower", 0, 0.2), row("ials", 0, 0.1, 0.08, 0.12), row("two-tower", 1, 0.3), row("ials", 1, 0.1, 0.15, 0.25)]
    text = page(scripts, tmp_path, rows).splitlines()
    systems = [line for line in text if line.startswith(("| two-tower", "| ials"))]
    assert systems == [
        "| two-tower | 0.2500 ± 0.0707 |  | 1.0 |",
        "| ials | 0.1000 ± 0.0000 | +0.1500 [+0.0800, +0.2500] | 1.0 |",
    ]
    assert any("`python benchmarks/quality.py town --seeds 0,1`" in line for line in text)


def test_only_the_latest_settings_and_rows_count(scripts: SimpleNamespace, tmp_path: Path) -> None:
    old = row("two-tower", 0, 0.9, config_hash="old")
    text = page(scripts, tmp_path, [old, row("two-tower", 0, 0.1), row("two-tower", 0, 0.2), row("ials", 0, 0.15)])
    assert "0.2000" in text and "0.9000" not in text and "0.1000" not in text
    assert text.index("| two-tower") < text.index("| ials")


def test_published_figures_stand_apart_with_their_source(scripts: SimpleNamespace, tmp_path: Path) -> None:
    text = page(scripts, tmp_path, [row("two-tower", 0, 0.02, set="s3rec")])
    published = text[text.index("not measured here") :]
    assert "| S3-Rec (categories) | 0.0123 | 0.0201 | 0.0168 | 0.0341 | 0.0226 | 0.0573 | S3-Rec repository |" in published
    assert "DuoRec" not in text, "another protocol"


def test_claims_have_a_table_of_their_own(scripts: SimpleNamespace, tmp_path: Path) -> None:
    claim = {"claim": "speed", "figure": 2.0, "unit": "s", "against": "a limit", "against_figure": 4.0, "ratio": 0.5}
    claim |= {"seed": 0, "machine": "1 core", "commit": "c0ffee"}
    (tmp_path / "speed.jsonl").write_text(json.dumps({**claim, "figure": 3.0}) + "\n" + json.dumps(claim) + "\n")
    text = scripts.report.render(tmp_path)
    assert "| speed | 2 s | a limit: 4 s | 0.5 | 0 | 1 core | c0ffee |" in text and "3 s" not in text


@pytest.mark.parametrize("bad", ['{"set": "town"}', '{"claim": "x"}', "[1]", "{"])
def test_a_damaged_row_is_named(scripts: SimpleNamespace, tmp_path: Path, bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quality.jsonl").write_text(json.dumps(row("ials", 0, 0.1)) + "\n" + bad + "\n")
    assert scripts.report.main(["--results", str(tmp_path), "--page", str(tmp_path / "page.md")]) == 2
    assert "quality.jsonl:2" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def test_the_check_notices_an_edited_page(scripts: SimpleNamespace, tmp_path: Path) -> None:
    target = tmp_path / "page.md"
    arguments = ["--results", str(ROOT / "benchmarks" / "results"), "--page", str(target)]
    assert scripts.report.main([*arguments, "--check"]) == 1
    assert scripts.report.main(arguments) == 0 == scripts.report.main([*arguments, "--check"])
    target.write_text(target.read_text().replace("Results", "Wishes"))
    assert scripts.report.main([*arguments, "--check"]) == 1


def test_the_page_of_results_is_up_to_date(scripts: SimpleNamespace) -> None:
    assert scripts.report.main(["--check"]) == 0, (
        "docs/results.md is not what benchmarks/results/ says: python benchmarks/report.py"
    )


@pytest.mark.slow
def test_large_indexes_are_measured(scripts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    arguments = ["--items", "5000", "--kinds", "exact,sq", "--folder", str(tmp_path), "--results", str(file)]
    assert scripts.large_index.main(arguments) == 0
    found = {row["claim"]: row for row in lines(file)}
    assert len(found) == 16 and capsys.readouterr().err.count("\n") == 16
    shares = ("no filter", "10 % allowed", "1 % allowed")
    assert all(found[f"exact, 5,000 × 128: recall of the 10 best, {share}"]["figure"] > 0.999 for share in shares)
    assert all(found[f"sq, 5,000 × 128: recall of the 10 best, {share}"]["figure"] >= 0.95 for share in shares)
    built, peak = (found[f"sq, 5,000 × 128: {what}"] for what in ("seconds of the build", "peak memory of the build, its own"))
    assert built["bytes"] > 5000 * 128 and 0 <= peak["figure"] < 2, "memory freed before can serve a small build"
    assert not [one for one in tmp_path.iterdir() if one != file], "the files are removed"


@pytest.mark.slow
def test_a_run_and_its_server_are_measured(scripts: SimpleNamespace, tmp_path: Path) -> None:
    raw, out, file = tmp_path / "raw", tmp_path / "run", tmp_path / "rows.jsonl"
    simulate_stage(raw, users=60, businesses=50, events=1200, seed=0)
    settings = [*(one for one in SMALL if "baselines" not in one), "evaluation.baselines=[ials]", "training.max_steps=8"]
    arguments = [str(raw), str(out), "--results", str(file), *(word for one in settings for word in ("--set", one))]
    assert scripts.full_run.main(arguments) == 0
    found = {row["claim"]: row for row in lines(file)}
    stages = [row for claim, row in found.items() if row["against"] == "all stages" and "alone" not in claim]
    assert len(stages) == 5 and sum(row["figure"] for row in stages) <= 1.01 * stages[0]["against_figure"]
    report = json.loads((out / "report.json").read_text())
    assert found["full size: test NDCG@10 of ials"]["figure"] == float(f"{report['systems']['ials']['NDCG@10']['value']:.4g}")
    curve = [row["figure"] for row in lines(file) if "validation NDCG@10 of two-tower" in row["claim"]]
    assert curve == [float(f"{value:.4g}") for value in validations(out / "model" / "metrics.jsonl")]
    served = tmp_path / "served.jsonl"
    assert scripts.large_bundle.main([str(out / "bundle"), "--requests", "5", "--results", str(served)]) == 0
    claims = [row["claim"].partition(": ")[2] for row in lines(served)]
    kinds = ["p50, known users", "p50, unknown users with 5 items"]
    assert claims == ["start of the server", "first answer", *kinds, "memory of its own", "peak memory, pages of files included"]
    assert all(row["figure"] > 0 for row in lines(served))


def test_a_curve_is_the_last_run_of_a_system_on_a_set(scripts: SimpleNamespace, tmp_path: Path) -> None:
    told, curves_of = scripts.quality_over_time.told, scripts.quality_over_time.curves_of
    rival = ("iALS", 2.0, 0.05)
    older = [told("toys", "two-tower", (seconds, 0.01), rival, 0) for seconds in (10.0, 20.0, 30.0)]
    newer = [told("toys", "two-tower", (seconds, 0.02), rival, 0) for seconds in (11.0, 22.0)]
    other = [told("beauty", "two-tower", (5.0, 0.03), rival, 0), told("toys", "iALS", (2.0, 0.05), rival, 0)]
    test = {**other[1], "claim": "toys, test NDCG@10 of iALS"}
    rows = [*older, *other, *newer, test]
    assert curves_of(rows) == {
        "toys": {"two-tower": [(11.0, 0.02), (22.0, 0.02)], "iALS": [(2.0, 0.05)]},
        "beauty": {"two-tower": [(5.0, 0.03)]},
    }
    scripts.quality_over_time.draw(rows, tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    assert drawn.count('id="axes_') == 2


def test_each_candidate_of_the_race_can_be_taken_apart(scripts: SimpleNamespace) -> None:
    candidates = {one.name: one.config for one in scripts.ablation.entrants(load_config(None))}
    assert set(candidates) == set(scripts.ablation.PARTS)
    for name, config in candidates.items():
        for changes in (scripts.ablation.SHARED_PARTS | scripts.ablation.PARTS[name]).values():
            assert scripts.ablation.with_settings(config, changes) != config


def test_a_peer_is_not_trained_without_figures_to_compare_with(
    scripts: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scripts.peers.main(["boston2015", "--peer-python", "python"]) == 2
    assert "Run quality.py and quality_over_time.py boston2015 first." in capsys.readouterr().err
    ours = scripts.peers.figures_of_ours("toys")
    assert set(ours.test) == set(scripts.peers.METRICS) and all(value > 0 for value in (*ours.valid, *ours.test.values()))

"""Test all commands on a small town: their order, exit codes, and output folders."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

from twotower.bundle.bundle import load_bundle
from twotower.cli import main
from twotower.data.dataset import Dataset
from twotower.errors import DataError
from twotower.features.geo import distances_km, median_location
from twotower.retrieval.recommender import Recommender

SMALL = """
model:
  user_tower: {embedding_dim: 16, hidden_dims: [16], max_history: 20}
  item_tower: {embedding_dim: 16, hidden_dims: [16]}
training: {batch_size: 256, num_epochs: 2, learning_rate: 0.01}
evaluation: {bootstrap_resamples: 50, baselines: [popular, ials]}
prepare: {text_dim: 8}
"""


@pytest.fixture(scope="module")
def journey(town, tmp_path_factory) -> Path:
    """A folder in which `twotower run` was typed."""
    out = tmp_path_factory.mktemp("journey")
    (out / "small.yaml").write_text(SMALL)
    assert main(["run", "--config", str(out / "small.yaml"), "--set", f"data.path={town.raw}", "--out", str(out / "run")]) == 0
    return out


def lines(capsys, *arguments: str) -> list[str]:
    capsys.readouterr()
    assert main(list(arguments)) == 0
    return capsys.readouterr().out.splitlines()


def test_run_leaves_what_it_says(journey):
    report = json.loads((journey / "run" / "report.json").read_text())
    assert set(report["systems"]) == {"two-tower", "two-tower, refreshed every 7 days", "popular", "ials", "oracle"}
    assert set(report["systems"]["two-tower"]["NDCG@10"]) == {"value", "low", "high"}
    assert report["protocol"]["split"] == "time"
    assert report["protocol"]["seen"] == "masked"
    assert re.match(r"(Better than|Worse than|A tie with) ", report["verdict"])
    assert "<html" in (journey / "run" / "report.html").read_text().lower()
    for name in ("dataset", "model", "bundle"):
        assert (journey / "run" / name / "manifest.json").is_file()


def test_each_verb_alone_gives_the_same(journey, town, tmp_path, capsys):
    config = ["--config", str(journey / "small.yaml")]
    lines(capsys, "prepare", "--data-dir", str(town.raw), "--output-dir", str(tmp_path / "processed"), *config)
    again, first = tmp_path / "processed", journey / "run" / "dataset"
    assert (again / "events.safetensors").read_bytes() == (first / "events.safetensors").read_bytes()
    lines(capsys, "train", "--data", str(tmp_path / "processed"), "--out", str(tmp_path / "model"), *config)
    lines(capsys, "export", str(tmp_path / "model"), "--out", str(tmp_path / "bundle"))
    one, other = load_bundle(journey / "run" / "bundle"), load_bundle(tmp_path / "bundle")
    assert torch.equal(one.vectors, other.vectors)
    (said, _) = lines(capsys, "evaluate", str(tmp_path / "model"), "--set", "evaluation.baselines=[popular]")
    assert re.match(r"(Better than|Worse than|A tie with) ", said)


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("report", "report.json"),
        ("dataset", "dataset/manifest.json"),
        ("run", "model/manifest.json"),
        ("bundle", "bundle/manifest.json"),
        ("dataset", "bundle/dataset/manifest.json"),
    ],
)
def test_the_files_fit_their_published_schemas(journey, capsys, kind, file):
    validator = jsonschema.Draft202012Validator(json.loads("\n".join(lines(capsys, "config", "--schema", kind))))
    content = json.loads((journey / "run" / file).read_text())
    validator.validate(content)
    for name in content:
        without = {key: value for key, value in content.items() if key != name}
        assert list(validator.iter_errors(without)), f"the schema does not know {name}"
    assert list(validator.iter_errors({**content, "more": 1})), "an unknown key is an error"


def test_a_refit_trains_on_the_held_out_events(journey, tmp_path, capsys):
    run = journey / "run" / "model"
    (said, _) = lines(capsys, "refit", str(journey / "run"), "--out", str(tmp_path / "refit"))
    assert re.match(r"(Better than|Worse than|A tie with) ", said)
    before, after = Dataset.open(journey / "run" / "dataset"), Dataset.open(tmp_path / "refit" / "dataset")
    counts = [d.manifest.counts.kept.json_values() for d in (before, after)]
    assert counts[1]["train_events"] == counts[0]["train_events"] + counts[0]["valid_events"] > counts[0]["train_events"]
    assert counts[1]["valid_events"] == 0 and counts[1]["test_events"] == counts[0]["test_events"]
    reports = [json.loads((folder / "report.json").read_text()) for folder in (journey / "run", tmp_path / "refit")]
    assert reports[0]["settings"] == reports[1]["settings"] and reports[0]["protocol"] == reports[1]["protocol"]
    assert reports[0]["systems"]["ials"] != reports[1]["systems"]["ials"], "fitted again"
    progress, again = (torch.load(folder / "best.pt", weights_only=True) for folder in (run, tmp_path / "refit" / "model"))
    taken = json.loads((tmp_path / "refit" / "model" / "manifest.json").read_text())["refit"]
    assert taken["stop_frac"] == progress["progress"]["best_step"] / progress["progress"]["total_steps"]
    assert taken["baseline_settings"] == {"ials": reports[0]["settings"]["ials"]}, "tuned once, on the validation part"
    assert lines(capsys, "evaluate", str(tmp_path / "refit"))
    assert json.loads((tmp_path / "refit" / "report.json").read_text())["systems"] == reports[1]["systems"]
    assert again["config"]["model"] == progress["config"]["model"]
    (said, where) = lines(capsys, "refit", str(run), "--out", str(tmp_path / "all"), "--include-test")
    assert said == "No test part: nothing was evaluated." and str(tmp_path / "all" / "bundle") in where
    everything = Dataset.open(tmp_path / "all" / "dataset").manifest.counts.kept.json_values()
    assert everything["train_events"] == everything["events"] == counts[0]["events"]
    assert lines(capsys, "recommend", str(tmp_path / "all"), "--user", str(before.user_ids[-1]), "--json")
    assert main(["refit", str(tmp_path / "all" / "model"), "--out", str(tmp_path / "twice")]) == 2
    assert "has no validation part. A refit needs one" in capsys.readouterr().err
    shutil.copytree(journey / "run" / "model", tmp_path / "run" / "model")
    wrong = json.dumps(reports[0]).replace('"factors"', '"factor"')
    (tmp_path / "run" / "report.json").write_text(wrong)
    assert main(["refit", str(tmp_path / "run"), "--out", str(tmp_path / "third")]) == 2
    assert "unknown setting 'factor' of the baseline 'ials'. Did you mean 'factors'?" in capsys.readouterr().err


def test_recommend_for_known_unknown_and_filtered(journey, capsys):
    bundle = str(journey / "run" / "bundle")
    dataset = Dataset.open(journey / "run" / "bundle" / "dataset")
    user = str(dataset.user_ids[np.argmax(np.diff(dataset.events.offsets))])
    known = [json.loads(line) for line in lines(capsys, "recommend", bundle, "--user", user, "--json")]
    assert [place["rank"] for place in known] == list(range(1, 11))
    assert set(known[0]) == {"rank", "item_id", "name", "categories", "city", "latitude", "longitude", "distance_km", "score"}
    seen = set(dataset.item_ids[dataset.events.item_row[slice(*dataset.events.offsets[dataset.user_rows([user])[0] :][:2])]])
    assert not seen & {place["item_id"] for place in known}
    assert [place["score"] for place in known] == sorted((place["score"] for place in known), reverse=True)

    assert lines(capsys, "recommend", bundle, "--user", user, "--json") == [json.dumps(p, ensure_ascii=False) for p in known]

    three = ",".join(place["item_id"] for place in known[:3])
    unknown = [json.loads(line) for line in lines(capsys, "recommend", bundle, "--history", three, "--k", "5", "--json")]
    assert len(unknown) == 5
    assert not set(three.split(",")) & {place["item_id"] for place in unknown}

    where = 'category == "Restaurants" and within(30)'
    near = [json.loads(line) for line in lines(capsys, "recommend", bundle, "--history", three, "--filter", where, "--json")]
    assert len(near) == 10
    assert all("Restaurants" in place["categories"] and place["distance_km"] <= 30 for place in near)


def test_every_command_ends_with_what_to_type_next(journey, tmp_path, capsys):
    """The lines are typed as they stand, until the server's."""
    shutil.copytree(journey / "run", tmp_path / "run")
    command, typed = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "bundle")], []
    while command[0] != "serve":
        typed.append(command[0])
        capsys.readouterr()
        assert main(command) == 0
        ((last),) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Next: ")]
        command = shlex.split(last.removeprefix("Next: twotower "))
    assert typed == ["export", "recommend"] and command == ["serve", str(tmp_path / "bundle")]
    assert (
        main(
            [
                "--quiet",
                "remove-items",
                str(tmp_path / "run"),
                "--ids",
                str(Dataset.open(tmp_path / "bundle" / "dataset").item_ids[2]),
            ]
        )
        == 0
    )
    assert capsys.readouterr().err == ""


def test_the_report_shows_what_the_popularity_dial_costs_and_gives(journey):
    report = json.loads((journey / "run" / "report.json").read_text())
    curve = report["popularity_tradeoff"]
    assert [row["popularity_bias"] for row in curve] == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    metric = report["protocol"]["metric"]
    assert curve[3][metric] == pytest.approx(
        report["systems"]["two-tower"][metric]["value"], abs=1e-6
    )  # at 0 it is the model itself
    assert curve[3]["coverage@10"] == pytest.approx(report["beyond"]["two-tower"]["coverage@10"], abs=1e-6)
    assert max(row["coverage@10"] for row in curve[:3]) > curve[3]["coverage@10"] > curve[-1]["coverage@10"]
    assert "Popularity bias" in (journey / "run" / "report.html").read_text()


def test_recommendations_are_the_models_own(journey):
    """The list equals the inner products of vectors made through the towers, and the prior of the items, by hand."""
    recommender = Recommender.load(journey / "run" / "bundle")
    dataset = recommender.dataset
    row = int(np.argmax(np.diff(dataset.events.offsets)))
    queries = dataset.histories(np.array([row]), np.array([recommender.moment_s]))
    with torch.inference_mode():
        vector = recommender.bundle.model.encode_users(recommender.bundle.store.users(queries))[0]
    priors, events, logs = recommender.bundle.model.priors, dataset.events, []
    age_days = (recommender.moment_s - events.time_s) / 86_400
    known = np.arange(dataset.n_item_rows) < 2 + dataset.n_train_items
    for half_life in priors.half_lives:
        decay = 0.5 ** (age_days / half_life) if half_life else np.ones(len(events))
        count = np.bincount(events.item_row[events.positive], (events.weight * decay)[events.positive], dataset.n_item_rows)
        log = np.log1p(count) - np.log1p(count[2:][known[2:]].mean())
        log[~known] = np.maximum(np.where(count > 0, log, -np.inf), float(priors.new_popularity))[~known]
        logs.append(log)
    first = np.full(dataset.n_item_rows, np.inf)
    np.minimum.at(first, dataset.item_events.item_row, dataset.item_events.time_s)
    since_days = np.maximum(recommender.moment_s - first, 0) / 86_400
    logs.append(np.where(np.isfinite(first), np.log1p(count), 0) * 0.5 ** (since_days / 60))
    weights = priors.weights[2].numpy()
    home = median_location(queries.offsets, queries.item_row, recommender.bundle.store.location)[0]
    away = distances_km(recommender.bundle.store.location, home).astype(float)
    half = np.where(np.isnan(away), float(priors.unlocated), away**2 / 2)
    beside = np.stack(logs, 1) @ weights[1:-1] - weights[-1] * half
    vectors, last = recommender.bundle.vectors, queries.item_row[::-1][:16].copy()
    recent = float(priors.recency) * vectors @ (0.5 ** torch.arange(len(last)) @ vectors[torch.from_numpy(last)])
    beside += recent.numpy()
    scores = weights[0] * (vectors @ vector).numpy() + recommender.bundle.config.model.temperature * beside
    scores[[0, 1, *queries.item_row]] = -np.inf
    scores[~recommender.bundle.arrays.offered] = -np.inf  # closed businesses
    best = np.argsort(-scores, kind="stable")[:10]
    assert [place.item_id for place in recommender.recommend(user=str(dataset.user_ids[row]))] == list(dataset.item_ids[best])


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare", "--data-dir", "nowhere", "--output-dir", "out"],
        ["prepare", "--output-dir", "out", "--set", "prepare.k_coer=true"],
        ["train", "--data", "nowhere", "--out", "out"],
        ["train", "--out", "out"],
        ["evaluate", "nowhere"],
        ["export", "nowhere", "--out", "out"],
        ["recommend", "nowhere", "--user", "x"],
        ["run", "--config", "missing.yaml", "--out", "out"],
        ["dance"],
        ["simulate", "--users", "-3", "--out", "out"],
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("twotower: error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--user", "nobody"],
        ["--history", "nothing"],
        [],
        ["--history", ""],
        ["--user", "a", "--history", "b"],
        ["--user", "nobody", "--filter", "("],
    ],
)
def test_bad_requests(journey, arguments, capsys):
    code = main(["recommend", str(journey / "run" / "bundle"), *arguments])
    if arguments == ["--history", ""]:
        assert code == 0  # nothing known: the model's answer to an empty history
        return
    assert code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["run", "--set", "evaluation.baselines=[popularr]"], "Did you mean 'popular'"),
        (["run", "--set", "training.eval_metric=ndcg@10"], "NDCG"),
        (["run", "--resume", "--set", "prepare.min_item_events=3"], "prepare.min_item_events was 1, is 3"),
    ],
)
def test_mistakes_surface_before_the_work(journey, town, tmp_path, command, said, capsys):
    out = journey / "run" if "--resume" in command else tmp_path / "run"
    common = ["--config", str(journey / "small.yaml"), "--set", f"data.path={town.raw}", "--out", str(out)]
    assert main([command[0], *common, *command[1:]]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_is_not_judged_on_other_data(journey, town, tmp_path, capsys):
    shutil.copytree(journey / "run", tmp_path / "run")
    arguments = ["prepare", "--config", str(journey / "small.yaml"), "--data-dir", str(town.raw)]
    again = ["--output-dir", str(tmp_path / "run" / "dataset"), "--overwrite", "--set", "prepare.positive_min_stars=3"]
    assert main([*arguments, *again]) == 0
    assert main(["evaluate", str(tmp_path / "run" / "model")]) == 2
    assert "has changed since" in capsys.readouterr().err
    assert main(["evaluate", str(journey / "run" / "model"), "--set", "training.seed=3"]) == 2


def test_a_changed_bundle_is_refused(journey, tmp_path):
    shutil.copytree(journey / "run" / "bundle", tmp_path / "bundle")
    with (tmp_path / "bundle" / "index.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(DataError, match="changed"):
        load_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "index.safetensors").unlink()
    with pytest.raises(DataError, match="missing"):
        load_bundle(tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(DataError, match="format"):
        load_bundle(tmp_path / "bundle")


def test_the_demo_is_the_quickstart_and_both_are_the_defaults():
    from twotower.utils.config import load_config, parse_config

    written = load_config(Path(__file__).parents[1] / "configs" / "quickstart.yaml")
    assert parse_config({"data": written.data.model_dump(mode="json")}) == written

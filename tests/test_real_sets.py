"""The whole way on real data: raw files to a report. Slow, and only where TWOTOWER_DATA names the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from twotower.config import load_config
from twotower.pipeline import run_all
from twotower.retrieval.recommender import Recommender

CONFIGS = Path(__file__).parents[1] / "configs"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_boston_2015_with_tips_as_events(real_data, tmp_path):
    path = real_data / "yelp-raw" / "2015-boston"
    settings = [f"data.path={path}", "training.num_epochs=3", "evaluation.bootstrap=100"]
    report = run_all(load_config(CONFIGS / "boston2015.yaml", settings), tmp_path)
    assert report["dataset"]["events"] == 5372
    assert report["dataset"]["event_types"] == ["tip"]
    assert {"two-tower", "ials", "nearby"} <= set(report["systems"])
    recommender = Recommender.load(tmp_path / "bundle")
    someone = str(recommender.dataset.item_ids[2])
    places = recommender.recommend(history=[someone], where='category == "Restaurants" and within(2)')
    assert len(places) == 10
    assert all(place.distance_km <= 2 and "Restaurants" in place.categories for place in places)


def test_the_heads_of_the_2022_release(real_data, tmp_path):
    settings = [f"data.path={real_data / 'yelp-raw' / '2022'}", "training.num_epochs=3", "evaluation.bootstrap=100"]
    report = run_all(load_config(None, settings), tmp_path)
    assert report["dataset"]["events"] == 1794
    assert report["dataset"]["items"] == 5000
    assert (tmp_path / "report.html").is_file()


def test_the_s3rec_split_beats_its_published_figures(real_data, tmp_path):
    """Published, protocol M: HR@10 .0341, NDCG@10 .0168 (S3-Rec with categories)."""
    settings = [f"data.path={real_data / 's3rec-yelp'}", "training.num_epochs=1", "evaluation.baselines=[popular]"]
    report = run_all(load_config(CONFIGS / "s3rec.yaml", settings), tmp_path)
    ours = report["systems"]["two-tower"]
    assert report["protocol"]["split"] == "leave_one_out"
    assert report["protocol"]["seen"] == "masked"
    assert report["protocol"]["queries"] == 30431
    assert ours["HitRate@10"]["low"] > 0.0341, json.dumps(ours)
    assert ours["NDCG@10"]["low"] > 0.0168, json.dumps(ours)

"""Test all stages on real data, from raw files to a report. The tests are slow, and need TWOTOWER_DATA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from twotower.pipeline.stages import run_all
from twotower.retrieval.recommender import Recommender
from twotower.serving.access import Access
from twotower.serving.app import create_app
from twotower.serving.service import Service
from twotower.utils.config import load_config
from twotower.utils.config_serving import Limits

CONFIGS = Path(__file__).parents[1] / "configs"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_boston_2015_with_tips_as_events(real_data, tmp_path):
    path = real_data / "yelp-raw" / "2015-boston"
    settings = [f"data.path={path}", "training.num_epochs=3", "evaluation.bootstrap_resamples=100"]
    report = run_all(load_config(CONFIGS / "boston2015.yaml", settings), tmp_path)
    assert report.dataset.events == 5372
    assert report.dataset.event_types == ["tip"]
    assert {"two-tower", "ials", "nearby"} <= set(report.systems)
    recommender = Recommender.load(tmp_path / "bundle")
    someone = str(recommender.dataset.item_ids[2])
    places = recommender.recommend(history=[someone], filter='category == "Restaurants" and within(2)')
    assert len(places) == 10
    assert all(place.distance_km <= 2 and "Restaurants" in place.categories for place in places)


def test_the_heads_of_the_2022_release(real_data, tmp_path):
    settings = [f"data.path={real_data / 'yelp-raw' / '2022'}", "training.num_epochs=3", "evaluation.bootstrap_resamples=100"]
    report = run_all(load_config(None, settings), tmp_path)
    assert report.dataset.events == 1794
    assert report.dataset.items == 5000
    assert (tmp_path / "report.html").is_file()


def test_the_s3rec_split_beats_its_published_figures(real_data, tmp_path):
    """Published, masked protocol: HR@10 .0341, NDCG@10 .0168 (S3-Rec with categories)."""
    settings = [f"data.path={real_data / 's3rec-yelp'}", "training.num_epochs=1", "evaluation.baselines=[popular]"]
    report = run_all(load_config(CONFIGS / "s3rec.yaml", settings), tmp_path)
    ours = report.systems["two-tower"]
    assert report.protocol.split == "leave_one_out"
    assert report.protocol.seen == "masked"
    assert report.protocol.queries == 30431
    assert ours["HitRate@10"].low > 0.0341, ours
    assert ours["NDCG@10"].low > 0.0168, ours
    _a_bundle_of_it_serves(tmp_path / "bundle")


def _a_bundle_of_it_serves(bundle: Path) -> None:
    """Check names, categories and radius filters of items with coordinates against plain arithmetic, also over HTTP."""
    recommender = Recommender.load(bundle)
    degrees = recommender.details.degrees
    placed = np.flatnonzero(np.isfinite(degrees).all(1))
    assert len(placed) == 2930
    busiest = placed[np.argmax(recommender.dataset.item_train_count[placed])]
    middle = degrees[busiest]
    a, b = np.radians(degrees[placed]), np.radians(middle)
    half = np.sin((a[:, 0] - b[0]) / 2) ** 2 + np.cos(a[:, 0]) * np.cos(b[0]) * np.sin((a[:, 1] - b[1]) / 2) ** 2
    near = set(recommender.dataset.item_ids[placed[2 * 6371 * np.arcsin(np.sqrt(half)) <= 4]])
    visited = [str(recommender.dataset.item_ids[busiest])]
    whole = [place.item_id for place in recommender.recommend(history=visited, k=recommender.dataset.n_item_rows)]
    expected = [item for item in whole if item in near]
    found = recommender.recommend(history=visited, k=25, filter="within(4)", near=(float(middle[0]), float(middle[1])))
    assert [place.item_id for place in found] == expected[:25] and len(expected) > 25
    assert all(place.name != place.item_id and place.categories for place in found)
    with TestClient(
        create_app(Service(bundle, f"sqlite:{bundle.parent / 'events.sqlite'}", Limits(rate=0)), Access(public=True))
    ) as client:
        body = {"history": [{"item_id": visited[0]}], "k": 25, "filter": {"within": 4}, "near": middle.tolist(), "explain": True}
        answer = client.post("/v1/recommend", json=body).json()
        assert [place["item_id"] for place in answer["items"]] == expected[:25] and answer["items"][0]["reasons"]
        assert client.get("/v1/items", params={"q": found[0].name}).json()["items"][0]["name"] == found[0].name
        assert client.get("/").status_code == 200

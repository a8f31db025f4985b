"""Test the search for Yelp's files, and the errors for missing files."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from twotower.data.sources.yelp import find_files
from twotower.errors import ConfigError, DataError

from .yelp_rows import BUSINESS, REVIEW, TIP, Read, write


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz"])
@pytest.mark.parametrize("stem", ["{}", "yelp_academic_dataset_{}"])
@pytest.mark.parametrize("folder", [".", "yelp-dataset", "yelp-dataset/yelp_dataset"])
def test_files_are_found_as_yelp_and_kaggle_lay_them_out(suffix: str, stem: str, folder: str, tmp_path: Path) -> None:
    for name in ("business", "tip"):
        path = write(tmp_path / folder, stem.format(name) + suffix, [BUSINESS if name == "business" else TIP])
        if suffix.endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    write(tmp_path / "elsewhere", "readme.txt", [])
    assert find_files(tmp_path) == find_files(tmp_path / folder)
    assert find_files(tmp_path)["tip"].name == stem.format("tip") + suffix
    if stem == "{}":
        assert len(Read(tmp_path).events()) == 1


def test_a_file_in_a_folder_of_its_own_name_is_found(tmp_path: Path) -> None:
    for name, row in (("business", BUSINESS), ("review", REVIEW)):
        file = f"yelp_academic_dataset_{name}.json"
        write(tmp_path / file, file, [row])
    assert len(Read(tmp_path).events()) == 1


def test_a_plain_file_is_preferred_to_its_gzipped_copy(tmp_path: Path) -> None:
    write(tmp_path, "business.json", [BUSINESS])
    path = write(tmp_path, "tip.json", [TIP])
    (tmp_path / "tip.json.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert find_files(tmp_path)["tip"].name == "tip.json"


def test_two_files_for_one_table_are_refused(tmp_path: Path) -> None:
    for name in ("business.json", "tip.json", "yelp_academic_dataset_tip.json"):
        write(tmp_path, name, [])
    with pytest.raises(DataError, match=r"has tip.json and yelp_academic_dataset_tip.json for the table 'tip'. .* Move one away"):
        find_files(tmp_path)


def test_two_releases_are_refused(tmp_path: Path) -> None:
    for folder in ("2015", "2022"):
        write(tmp_path / folder, "business.json", [BUSINESS])
    with pytest.raises(DataError, match=r"several folders.*2015.*2022.*Set data.path to one of them"):
        find_files(tmp_path)


@pytest.mark.parametrize(
    ("tables", "events", "message"),
    [
        ([], ["review"], "holds nothing"),
        (["notes.txt"], ["review"], "holds notes.txt"),
        (["business.json"], ["review", "tip"], "found business.json. "),
        (["review.json"], ["review", "tip"], "found review.json. "),
        (["business.json", "checkin.json"], ["review", "tip", "checkin"], "found business.json, checkin.json. "),
        (["business.json", "tip.json"], ["review"], "found business.json, tip.json. "),
    ],
)
def test_a_missing_file_is_one_line(tables: list[str], events: list[str], message: str, tmp_path: Path) -> None:
    for name in tables:
        write(tmp_path, name, [])
    with pytest.raises(DataError, match=message) as caught:
        Read(tmp_path, events=events)
    assert "\n" not in str(caught.value) and "data.path" in str(caught.value)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        Read(tmp_path / "nowhere")


def test_an_unknown_event_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown table 'reviews'. Did you mean 'review'\?"):
        Read(tmp_path, events=["reviews"])

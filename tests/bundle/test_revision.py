"""Test that items are added by their features and removed again, and that the bundle is valid at all times."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from twotower.bundle import revision
from twotower.bundle.bundle import load_bundle
from twotower.bundle.item_file import read_items
from twotower.bundle.revision import add_items, remove_items
from twotower.cli import main
from twotower.errors import DataError
from twotower.retrieval.recommender import Recommender
from twotower.utils.array_files import write_arrays


@pytest.fixture
def bundle(town_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(town_bundle, tmp_path / "bundle"))


def twin(path: Path, row: int, name: str) -> dict[str, Any]:
    """Return the columns of an item under another id."""
    return {**Recommender.load(path).details.describe(row), "item_id": name}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_new_item_is_what_its_features_say(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = load_bundle(bundle)
    unvisited = before.dataset.n_train_item_rows  # its id is unknown to the model: a twin differs in its visits and texts alone
    assert unvisited < before.dataset.n_item_rows
    file = write(tmp_path / "new.jsonl", [twin(bundle, unvisited, "new one"), {"item_id": "bare"}])
    assert main(["add-items", str(bundle), "--items", str(file)]) == 0
    assert capsys.readouterr().out == f"{bundle}: revision 1\n"
    after = load_bundle(bundle)
    row, bare = after.dataset.item_rows(["new one", "bare"])
    n = before.dataset.n_item_rows
    assert (row, bare, after.dataset.n_item_rows) == (n, n + 1, n + 2)
    np.testing.assert_array_equal(after.arrays.vectors[:n], before.arrays.vectors)
    known = after.arrays.vectors[[row, bare], after.vectors.shape[1] :][:, : len(before.model.priors.half_lives)]
    assert (known == float(before.model.priors.new_popularity)).all()
    assert float(before.model.priors.new_popularity) != 0
    for name, value in after.dataset.item_features.items():
        if name != "text":
            np.testing.assert_array_equal(value[row], value[unvisited])
    assert after.dataset.events.item_row.tolist() == before.dataset.events.item_row.tolist()
    assert (after.model.log_temperature == before.model.log_temperature).all()
    recommender = Recommender.load(bundle)
    found = [place.item_id for place in recommender.recommend(history=["new one", "bare"], k=n, exclude_seen=False)]
    assert {"new one", "bare"} <= set(found)
    assert recommender.recommend(history=["bare"], filter='id == "new one"', k=3)[0].name == twin(bundle, row, "new one")["name"]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_every_form_of_a_file_says_the_same(bundle: Path, tmp_path: Path, form: str) -> None:
    row = twin(bundle, 5, "again") | {"price": 2}
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    add_items(bundle, write(tmp_path / "new.jsonl", [row]))
    file = tmp_path / f"new.{form}"
    if form == "csv":
        flat = {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
        pyarrow.csv.write_csv(pa.Table.from_pylist([flat]), file)
    else:
        pq.write_table(pa.Table.from_pylist([row]), file)
    add_items(other, file)
    one, same = load_bundle(bundle), load_bundle(other)
    assert one.dataset.items.equals(same.dataset.items)
    np.testing.assert_array_equal(one.arrays.vectors, same.arrays.vectors)


def test_what_goes_out_is_offered_no_more_but_still_counts(bundle: Path, tmp_path: Path) -> None:
    recommender = Recommender.load(bundle)
    first, second = (str(place.item_id) for place in recommender.recommend(history=[], k=2))
    assert main(["remove-items", str(bundle), "--ids", f"{first}, {second}"]) == 0
    remove_items(bundle, [first])
    after = Recommender.load(bundle)
    n = after.dataset.n_item_rows
    for history in ([], [str(after.dataset.item_ids[50])], [first]):
        offered = {place.item_id for place in after.recommend(history=history, k=n, filter="not price == 9 or price == 9")}
        offered |= {place.item_id for place in after.recommend(history=history, k=n)}
        assert not {first, second} & offered and len(offered) >= np.count_nonzero(after.bundle.arrays.offered) - 3
    assert after.recommend(history=[first], k=3) != after.recommend(history=[str(after.dataset.item_ids[50])], k=3)
    add_items(
        bundle, write(tmp_path / "back.jsonl", [twin(bundle, after.dataset.item_rows([first])[0], first) | {"name": "New Name"}])
    )
    back = Recommender.load(bundle)
    assert back.dataset.n_item_rows == n and back.bundle.manifest.revision == 3
    assert back.recommend(history=[second], k=1, filter=f'id == "{first}"')[0].name == "New Name"
    np.testing.assert_allclose(back.bundle.vectors.sum(), after.bundle.vectors.sum(), atol=1)
    width = back.bundle.vectors.shape[1]  # as popular as before, and in the same location
    np.testing.assert_array_equal(back.bundle.arrays.vectors[:, width:], after.bundle.arrays.vectors[:, width:])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"item_id": "a"}, {"item_id": "a"}], "row 2 repeats item 'a' of row 1"),
        ([{"name": "no id"}], "item_id is missing"),
        ([{"item_id": "a", "colour": "red"}], "no column 'colour'"),
        ([{"item_id": "a", "price": "dear"}], "price is 'dear'; it must be a number (int64)"),
        ([{"item_id": "a", "price": 1.5}], "it must be a number"),
        ([{"item_id": "a", "latitude": 91.0}], "latitude is 91.0; it must be from -90 to 90"),
        ([{"item_id": "a", "hours": "Mon-Fri"}], "168 characters"),
        ([{"item_id": "a", "categories": 3}], "it must be a list"),
        ([{"item_id": "a", "name": ["x"]}], "it must be of type string"),
        ([], "contains no items"),
    ],
)
def test_what_is_no_item_is_one_line(recommender: Recommender, tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    dataset = recommender.dataset
    with pytest.raises(DataError) as caught:
        read_items(write(tmp_path / "new.jsonl", rows), dataset.items.schema, dataset.specs)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_none_and_items_that_are_there(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("PAR1")
    (tmp_path / "x.jsonl").write_text("{")
    before = (bundle / "manifest.json").read_bytes()
    for name in ("x.parquet", "x.jsonl", "x.xlsx", "none.csv"):
        assert main(["add-items", str(bundle), "--items", str(tmp_path / name)]) == 2
    there = str(load_bundle(bundle).dataset.item_ids[4])
    with pytest.raises(DataError, match="already in the catalogue"):
        add_items(bundle, write(tmp_path / "new.jsonl", [{"item_id": there}]))
    with pytest.raises(DataError, match="'nothing'"):
        remove_items(bundle, ["nothing"])
    assert (bundle / "manifest.json").read_bytes() == before


def test_a_loader_always_finds_one_complete_version(bundle: Path) -> None:
    first = load_bundle(bundle)
    closed = np.count_nonzero(~first.arrays.offered[2:])
    ids = [str(first.dataset.item_ids[row]) for row in np.flatnonzero(first.arrays.offered)[:8]]
    failed: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                found = load_bundle(bundle)
                if found.manifest.revision != (~found.arrays.offered[2:]).sum() - closed:
                    failed.append("mixed")
            except DataError as error:
                failed.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    for one in ids:
        remove_items(bundle, [one])
    done.set()
    reader.join()
    assert not failed


def test_two_revisions_at_once_lose_none(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (str(name) for name in load_bundle(bundle).dataset.item_ids[2:4])

    def meanwhile(*arguments: Any) -> None:
        monkeypatch.setattr(revision, "write_arrays", write_arrays)
        remove_items(bundle, [first])
        write_arrays(*arguments)

    monkeypatch.setattr(revision, "write_arrays", meanwhile)
    with pytest.raises(DataError, match="Run the command again"):
        remove_items(bundle, [second])
    assert load_bundle(bundle).arrays.offered[2:4].tolist() == [False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_who_has_a_bundle_open_goes_on_with_it(bundle: Path) -> None:
    recommender = Recommender.load(bundle)
    user = str(recommender.dataset.user_ids[50])
    before = recommender.recommend(user=user, k=20)
    remove_items(bundle, [place.item_id for place in before])
    assert recommender.recommend(user=user, k=20) == before
    assert not {place.item_id for place in Recommender.load(bundle).recommend(user=user, k=20)} & {p.item_id for p in before}

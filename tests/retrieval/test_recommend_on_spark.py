"""Test lists for all users on Spark: equal to those of this process, and finished parts are not computed again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from twotower.cli import main
from twotower.errors import ConfigError, DataError, RequestError
from twotower.retrieval import recommend_on_spark as module
from twotower.retrieval.recommend_all import recommend_all
from twotower.retrieval.recommend_on_spark import recommend_on_spark
from twotower.retrieval.recommender import Recommender
from twotower.retrieval.request import Request

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:PySpark does not yet fully support pandas:FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of the pipes to Java
]
NARROW = Request(k=4, filter='category == "Restaurants" and within(9)', popularity_bias=-0.7, diversity=0.3, exclude_seen=False)


@pytest.fixture(autouse=True)
def spark(lacking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip without Spark. Make blocks and parts so small that the town has several of them."""
    if shutil.which("java") is None:
        lacking("needs Java 17 for Spark: there is no `java`")
    pytest.importorskip("pyspark")
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(module, "TASK_BLOCKS", 1)
    monkeypatch.setattr(module, "TASKS_A_CORE", 1)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(module.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))


def read(folder: Path) -> pa.Table:
    """Return the lists of a folder as any reader of partitioned Parquet finds them."""
    table = ds.dataset(folder, format="parquet", partitioning="hive").to_table()
    return table.drop_columns(["part"])


def test_lists_equal_those_of_this_process(town_bundle: Path, recommender: Recommender, tmp_path: Path) -> None:
    for number, request in enumerate((Request(k=5), NARROW)):
        alone, out = tmp_path / f"{number}.parquet", tmp_path / f"{number}"
        users = recommend_all(recommender, alone, request)
        assert recommend_on_spark(town_bundle, str(out), request, master="local[2]") == users
        wanted, found = pq.read_table(alone), read(out)
        assert found.schema.names == wanted.schema.names and found.num_rows == wanted.num_rows
        for name in ("user_id", "rank", "item_id"):
            assert found[name].to_pylist() == wanted[name].to_pylist(), name
        assert max(abs(a - b) for a, b in zip(found["score"].to_pylist(), wanted["score"].to_pylist(), strict=True)) < 1e-6
        assert len(list(out.glob("part=*"))) == -(-users // 128) and (out / "_SUCCESS").is_file()


def test_what_was_cut_off_goes_on(town_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "lists"

    def stop(_label: str, done: int, _total: int) -> None:
        if done == 128:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recommend_on_spark(town_bundle, str(out), Request(k=3), master="local[2]", report=stop)
    first = sorted(out.glob("part=00000/*.parquet"))[0]
    before = first.stat().st_mtime_ns
    (out / "part=00001").mkdir()
    (out / "part=00001" / "left.parquet").write_bytes(b"of a killed job")
    began = json.loads((out / "_twotower.json").read_text())["now"]
    users = recommend_on_spark(town_bundle, str(out), Request(k=3), master="local[1]")
    assert first.stat().st_mtime_ns == before, "a finished part is not computed again"
    assert json.loads((out / "_twotower.json").read_text())["now"] == began
    table = read(out)
    assert table.num_rows == 3 * users and len(set(table["user_id"].to_pylist())) == users
    with pytest.raises(DataError, match="has all these lists already"):
        recommend_on_spark(town_bundle, str(out), Request(k=3), master="local[1]")
    with pytest.raises(DataError, match="lists of another bundle or request"):
        recommend_on_spark(town_bundle, str(out), Request(k=2), master="local[1]")
    recommend_on_spark(town_bundle, str(out), Request(k=2), master="local[1]", overwrite=True)
    assert read(out).num_rows == 2 * users


def test_a_folder_of_others_stays(town_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs.txt").write_text("theirs")
    with pytest.raises(DataError, match=r"has other files: theirs.txt"):
        recommend_on_spark(town_bundle, str(tmp_path), Request(), master="local[1]", overwrite=True)
    assert (tmp_path / "theirs.txt").read_text() == "theirs"


def test_a_bundle_that_changes_meanwhile_is_named(town_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "bundle"
    shutil.copytree(town_bundle, other)
    blocks = module._blocks

    def changed(*arguments: Any) -> Any:
        from twotower.bundle.revision import remove_items

        if not (tmp_path / "done").exists():
            remove_items(other, [str(Recommender.load(other).dataset.item_ids[2])])
            (tmp_path / "done").touch()
        return blocks(*arguments)

    monkeypatch.setattr(module, "_blocks", changed)
    with pytest.raises(DataError, match="An executor has another bundle at") as error:
        recommend_on_spark(other, str(tmp_path / "out"), Request(k=1), master="local[1]")
    assert "\n" not in str(error.value)


def test_mistakes(town_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(RequestError):
        recommend_on_spark(town_bundle, str(tmp_path / "out"), Request(filter="("), master="local[1]")
    with pytest.raises(ConfigError, match="Cannot start Spark with the master 'moon'"):
        recommend_on_spark(town_bundle, str(tmp_path / "out"), Request(), master="moon")
    with pytest.raises(DataError, match=r"Spark cannot write lists to s3a://lists/town: .*S3AFileSystem"):
        recommend_on_spark(town_bundle, "s3a://lists/town", Request(), master="local[1]")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    capsys.readouterr()
    arguments = ["recommend", str(town_bundle), "--all", "--engine", "spark", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "Cannot start Spark: there is no java on the PATH" in said and len(said.strip().splitlines()) == 1
    for wrong in (arguments[:2] + arguments[3:], [*arguments[:3], "--spark-master", "local", *arguments[5:]], arguments[:5]):
        assert main(wrong) == 2
    assert not (tmp_path / "out").exists()

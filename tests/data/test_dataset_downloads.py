"""Test downloads of datasets by name, from a server on loopback."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from twotower.cli import main
from twotower.data import named_datasets
from twotower.data.named_datasets import NamedDataset, download
from twotower.errors import ConfigError, DataError


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address that serves it on loopback."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def do_GET(self) -> None:
            if self.path != "/half.zip":
                return super().do_GET()
            self.send_response(200)  # the connection ends in the middle of the file
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b"PK\x03\x04")
            return None

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def zipped(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def tarred(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


def example(*files: tuple[str, str], category: str | None = None) -> NamedDataset:
    return NamedDataset(
        name="example",
        title="Example",
        rows="1",
        size="1 MB",
        licence="MIT",
        address="https://example.org",
        special="",
        settings={"data": {"path": "data/example"}},
        files=files,
        category=category,
    )


@pytest.mark.parametrize(("ending", "pack"), [("zip", zipped), ("tar.gz", tarred)])
@pytest.mark.parametrize("inside", ["", "ml-1m/"])
def test_an_archive_is_downloaded_checked_and_unpacked(
    ending: str, pack: Callable[[dict[str, str]], bytes], inside: str, server: tuple[Path, str], tmp_path: Path
) -> None:
    folder, address = server
    content = pack({f"{inside}ratings.dat": "1::2::3::4\n", f"{inside}movies.dat": "2::x::y\n"})
    (folder / f"set.{ending}").write_bytes(content)
    known = f"md5:{hashlib.md5(content).hexdigest()}"
    found = download(example((f"{address}/set.{ending}", known)), tmp_path / "out")
    assert found == {f"set.{ending}": f"sha256:{hashlib.sha256(content).hexdigest()}"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"ratings.dat", "movies.dat", "downloads.json"}


def test_files_of_a_category_are_downloaded_and_recorded(server: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = server
    for name in ("reviews_Beauty.json.gz", "reviews_Toys.json.gz"):
        (folder / name).write_bytes(gzip.compress(name.encode()))
    known = example((f"{address}/reviews_{{category}}.json.gz", ""), category="Beauty")
    assert list(download(known, tmp_path / "out")) == ["reviews_Beauty.json.gz"]
    assert list(download(known, tmp_path / "toys", category="Toys")) == ["reviews_Toys.json.gz"]
    with pytest.raises(ConfigError, match="no categories"):
        download(example((f"{address}/reviews_Beauty.json.gz", "")), tmp_path / "x", category="Toys")
    (folder / "reviews_Beauty.json.gz").write_bytes(gzip.compress(b"changed"))
    with pytest.raises(DataError, match="checksum"):
        download(known, tmp_path / "out")
    assert gzip.decompress((tmp_path / "out" / "reviews_Beauty.json.gz").read_bytes()) == b"reviews_Beauty.json.gz"


@pytest.mark.parametrize(
    ("file", "known", "message"),
    [
        ("set.zip", "md5:" + "0" * 32, "checksum"),
        ("none.zip", "", "the server answered 404"),
        ("off.zip", "", "cannot be reached"),
        ("half.zip", "", "cannot be reached"),
    ],
)
def test_a_failed_download_leaves_nothing(file: str, known: str, message: str, server: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = server
    (folder / "set.zip").write_bytes(zipped({"a": "b"}))
    if file == "off.zip":
        address = address.rpartition(":")[0] + ":9"  # nothing listens there
    with pytest.raises(DataError, match=message) as caught:
        download(example((f"{server[1]}/set.zip", ""), (f"{address}/{file}", known)), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    assert {child.name for child in tmp_path.iterdir()} == {"served"}


def test_get_downloads_by_name_and_keeps_what_is_there(
    server: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, address = server
    (folder / "set.zip").write_bytes(zipped({"set/events.csv": "user,item\na,b\n"}))
    about = {"title": "Mine", "rows": "1", "size": "1", "licence": "MIT", "address": "https://x", "special": "-"}
    described = {"about": {**about, "files": [{"url": f"{address}/set.zip"}]}, "data": {"source": "tables", "path": "data/mine"}}
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "mine.yaml").write_text(yaml.safe_dump(described))
    monkeypatch.setattr(named_datasets, "FOLDER", tmp_path / "lists")
    monkeypatch.chdir(tmp_path)
    assert main(["datasets", "get", "mine"]) == 0
    assert (tmp_path / "data" / "mine" / "events.csv").read_text() == "user,item\na,b\n"
    out, err = capsys.readouterr()
    assert "set.zip: sha256:" in out and "Licence: MIT" in out and "Next: twotower run --data mine --out runs/mine" in err
    assert main(["datasets", "get", "mine"]) == 2 and "--overwrite" in capsys.readouterr().err
    assert main(["datasets", "get", "mine", "--out", "other"]) == 0
    assert "--set data.path=other" in capsys.readouterr().err
    assert main(["datasets", "get", "nine"]) == 2 and "Did you mean 'mine'" in capsys.readouterr().err


def test_datasets_behind_an_account_say_where_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["datasets", "get", "retailrocket", "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "https://www.kaggle.com/datasets/retailrocket/ecommerce-dataset" in err and not (tmp_path / "out").exists()

"""List the datasets that are known by name, describe how each is read, and download them whole or not at all.

Each is a file in `datasets/`: `about` says what it is and where it comes from, the other sections are a configuration.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from twotower.errors import ConfigError, DataError, nearest, require
from twotower.utils.atomic_files import atomic_folder

FOLDER = Path(__file__).with_name("datasets")
RECORD = "downloads.json"  # SHA-256 of each downloaded file
TIMEOUT_S = 30
CATEGORY = "{category}"

Say = Callable[[str], None]


@dataclass(frozen=True)
class NamedDataset:
    """A dataset that is known by name.

    Attributes
    ----------
    name
        Its name on the command line.
    title, rows, size, licence, address, special
        Text for people.
    files
        (address, hash or "") of each file; empty if it cannot be downloaded without an account. Addresses may have "{category}".
    category
        The category that is downloaded by default; None if there are none.
    settings
        Sections of a configuration.
    """

    name: str
    title: str
    rows: str
    size: str
    licence: str
    address: str
    special: str
    settings: dict[str, Any]
    files: tuple[tuple[str, str], ...] = ()
    category: str | None = None

    @property
    def path(self) -> Path:
        """The folder in which its files are expected."""
        return Path(self.settings["data"]["path"])


def names() -> list[str]:
    """Return the names of all datasets.

    Examples
    --------
    >>> "movielens-1m" in names()
    True
    """
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def named_dataset(name: str) -> NamedDataset:
    """Return a dataset by name.

    Raises
    ------
    ConfigError
        There is no dataset of this name; the message has the nearest one.

    Examples
    --------
    >>> named_dataset("movielens-1m").settings["data"]["interactions"]["separator"]
    '::'
    """
    if name not in names():
        raise ConfigError(f"There is no dataset named {name!r}.{nearest(name, names())} See them with `twotower datasets`.")
    settings = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    about = settings.pop("about")
    files = tuple((file["url"], file.get("hash", "")) for file in about.pop("files", ()))
    return NamedDataset(name=name, settings=settings, files=files, **about)


def download(dataset: NamedDataset, out: Path, *, category: str | None = None, say: Say = lambda _: None) -> dict[str, str]:
    """Download and unpack the files of a dataset to a new folder `out`, and return the SHA-256 of each.

    The folder appears when all files are there and their checksums are right. A file without a published checksum is compared with
    the one recorded at its first download, if `out` is replaced.

    Raises
    ------
    DataError
        An account is needed, the address cannot be reached, or a checksum differs. Then `out` is as it was.
    MissingExtraError
        The extra `datasets` is not installed.
    """
    if not dataset.files:
        raise DataError(
            f"{dataset.name} cannot be downloaded without an account. Download it at {dataset.address} and unpack it into {out}."
        )
    if category is not None and dataset.category is None:
        raise ConfigError(f"{dataset.name} has no categories, so --category {category!r} is not allowed. Leave it out.")
    require("datasets", "pooch")
    recorded = json.loads((out / RECORD).read_text()) if (out / RECORD).is_file() else {}
    found: dict[str, str] = {}
    with atomic_folder(out) as fresh:
        for address, known in dataset.files:
            url = address.replace(CATEGORY, category or dataset.category or "")
            say(f"{url}")
            name = Path(urlsplit(url).path).name
            file = _fetched(dataset, url, known or recorded.get(name, ""), fresh / name, out)
            found[name] = f"sha256:{_sha256(file)}"
            _unpacked(file, fresh)
        (fresh / RECORD).write_text(json.dumps(found, indent=1) + "\n")
    return found


def _fetched(dataset: NamedDataset, url: str, known: str, file: Path, out: Path) -> Path:
    import pooch
    import requests

    try:
        pooch.get_logger().setLevel("ERROR")
        downloader = pooch.HTTPDownloader(timeout=TIMEOUT_S, progressbar=False)
        return Path(pooch.retrieve(url, known or None, file.name, file.parent, downloader=downloader))
    except requests.exceptions.HTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        why = f"the server answered {status}"
    except (requests.exceptions.RequestException, OSError) as error:
        why = f"{urlsplit(url).hostname} cannot be reached ({type(error).__name__})"
    except ValueError:
        raise DataError(
            f"{dataset.name}: the checksum of {url} is not {known}. Nothing was kept. Try again; if it stays so, the file has "
            f"changed at its source: see {dataset.address}."
        ) from None
    raise DataError(
        f"{dataset.name} was not downloaded: {why}. Check the network, or download {url} by hand and unpack it into {out}."
    )


def _unpacked(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar archive into the folder, without a single folder around its files, and remove it."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
    elif archive.name.endswith((".tar.gz", ".tgz", ".tar")):
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
    else:
        return
    archive.unlink()
    inner = [child for child in folder.iterdir() if child.is_dir() and child.name != "__MACOSX"]
    if len(inner) == 1 and not [child for child in folder.iterdir() if child.is_file()]:
        for child in inner[0].iterdir():
            child.rename(folder / child.name)
        inner[0].rmdir()


def _sha256(file: Path) -> str:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()

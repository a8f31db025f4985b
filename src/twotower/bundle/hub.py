"""Upload bundles to the Hugging Face hub or to Kaggle, and download them.

A repository holds the files of one bundle and a model card; a Kaggle model holds the files alone. A downloaded bundle is checked
like any other.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from twotower.bundle.sealed_folder import MANIFEST, atomic_replace, verify_manifest
from twotower.errors import DataError, require
from twotower.utils.manifests import BundleManifest

CARD = "README.md"
REPOSITORY_FILES = (CARD, ".gitattributes", ".cache")  # files of the hub that are not part of the bundle


def push_to_hub(bundle: Path, repository: str, *, private: bool = True, token: str | None = None) -> str:
    """Check a bundle and upload it with a model card. Return the address of the commit.

    Parameters
    ----------
    repository
        "owner/name"; created if it does not exist.
    token
        Access token of the hub; None: the one saved by `hf auth login`.

    Raises
    ------
    DataError
        The folder is not a bundle, or has changed since it was written.
    """
    manifest = verify_manifest(bundle)
    api = _hub().HfApi(token=token)
    api.create_repo(repository, private=private, exist_ok=True)
    uploaded = api.upload_folder(repo_id=repository, folder_path=str(bundle), delete_patterns=["*"], commit_message="A bundle")
    api.upload_file(path_or_fileobj=card(manifest).encode(), path_in_repo=CARD, repo_id=repository)
    return str(uploaded)


def from_pretrained(source: str, out: Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download a bundle from the hub, or copy it from a local repository folder, into the folder `out`, and check it.

    Parameters
    ----------
    source
        "owner/name" on the hub, or a folder.
    revision
        Branch, tag or commit; None: the newest.

    Returns
    -------
    Path
        `out`; open it with `twotower.load`.

    Raises
    ------
    DataError
        The repository is not a bundle, or has changed since it was written.
    """
    with atomic_replace(out) as folder:
        if Path(source).is_dir():
            shutil.copytree(source, folder, dirs_exist_ok=True, symlinks=True)
        else:
            _hub().snapshot_download(source, revision=revision, local_dir=str(folder), token=token)
        for name in REPOSITORY_FILES:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        verify_manifest(folder)
    return out


def push_to_kaggle(bundle: Path, handle: str, *, notes: str = "") -> None:
    """Check a bundle and upload it as a new version of a Kaggle model.

    Parameters
    ----------
    handle
        "owner/model/framework/variation", such as "ana/shop/other/default".
    notes
        Notes of the version.

    Raises
    ------
    DataError
        The folder is not a bundle, or has changed since it was written.
    """
    verify_manifest(bundle)
    _kagglehub().model_upload(handle, str(bundle), version_notes=notes)


def from_kaggle(handle: str, out: Path) -> Path:
    """Download a bundle from a Kaggle model, "owner/model/framework/variation" or with "/version", into the folder `out`; check it.

    Raises
    ------
    DataError
        The model is not a bundle, or has changed since it was written; or it cannot be downloaded.
    """
    kagglehub = _kagglehub()
    try:
        found = kagglehub.model_download(handle)
    except (OSError, ValueError) as error:  # the errors of requests are OSErrors
        raise DataError(
            f"The Kaggle model {handle!r} cannot be downloaded: {str(error)[:200]}. Check its name and the login."
        ) from None
    with atomic_replace(out) as folder:
        shutil.copytree(found, folder, dirs_exist_ok=True)
        verify_manifest(folder)
    return out


def card(manifest: BundleManifest) -> str:
    """Return the model card (README) of the repository: metric, features and example code."""
    best = manifest.metrics
    quality = "Not evaluated" if best is None or best.value is None else f"{best.metric} {best.value:.4f} on validation"
    features = ", ".join(f"{spec.name} ({spec.kind})" for spec in manifest.features) or "none"
    return f"""---
library_name: two-tower-rec
tags: [recommender-systems, retrieval, two-tower]
---
# A two-tower retrieval bundle

{quality}. Features: {features}. `{MANIFEST}` lists the SHA-256 of every file. Loading checks them and runs no code.

```python
from pathlib import Path
import twotower
from twotower.bundle.hub import from_pretrained

recommender = twotower.load(from_pretrained("OWNER/NAME", Path("bundle")))
recommender.recommend(history=["ITEM_ID"], k=10)
```
"""


def _kagglehub() -> Any:
    require("kaggle", "kagglehub")
    import kagglehub

    return kagglehub


def _hub() -> Any:
    require("hub", "huggingface_hub")
    import huggingface_hub

    return huggingface_hub

"""Bundles to and from the Hugging Face hub: a bundle is a folder of plain files, and so is a repository.

Enters: a bundle, or the name of a repository. Leaves: a repository with a card, or a bundle that was checked like any other.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from twotower.bundle.sealed_folder import MANIFEST, atomic_replace, verify_manifest
from twotower.errors import require

CARD = "README.md"
REPOSITORY_FILES = (CARD, ".gitattributes", ".cache")  # what the hub keeps beside a bundle's own files


def push_to_hub(bundle: Path, repository: str, *, private: bool = True, token: str | None = None) -> str:
    """Upload a checked bundle with a card that says what it is; returns the address of the commit.

    Parameters
    ----------
    repository
        "owner/name"; made where there is none.
    token
        Of the hub; None: the one `hf auth login` left.

    Raises
    ------
    DataError
        The bundle is not as it was written.
    """
    manifest = verify_manifest(bundle)
    api = _hub().HfApi(token=token)
    api.create_repo(repository, private=private, exist_ok=True)
    uploaded = api.upload_folder(repo_id=repository, folder_path=str(bundle), delete_patterns=["*"], commit_message="A bundle")
    api.upload_file(path_or_fileobj=card(manifest).encode(), path_in_repo=CARD, repo_id=repository)
    return str(uploaded)


def from_pretrained(source: str, out: Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """Fetch a bundle from the hub, or from a local folder laid out like a repository, into the folder `out`, and check it.

    Parameters
    ----------
    source
        "owner/name" on the hub, or a folder.
    revision
        Branch, tag or commit; None: the newest.

    Returns
    -------
    Path
        `out`, to be opened with `twotower.load`.

    Raises
    ------
    DataError
        What comes is no bundle, or not as it was written.
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


def card(manifest: dict[str, Any]) -> str:
    """The repository's README: what the bundle recommends, how well, and how to ask it."""
    metrics = manifest.get("metrics", {})
    value = metrics.get("value")
    said = "not judged" if value is None else f"{metrics['metric']} {value:.4f} on validation"
    features = ", ".join(f"{spec['name']} ({spec['kind']})" for spec in manifest["features"]) or "none"
    return f"""---
library_name: two-tower-rec
tags: [recommender-systems, retrieval, two-tower]
---
# A two-tower retrieval bundle

{said}. Features: {features}. Every file is named with its sha256 in `{MANIFEST}`; loading checks them and runs no code.

```python
from pathlib import Path
import twotower
from twotower.bundle.hub import from_pretrained

recommender = twotower.load(from_pretrained("OWNER/NAME", Path("bundle")))
recommender.recommend(history=["ITEM_ID"], k=10)
```
"""


def _hub() -> Any:
    require("hub", "huggingface_hub")
    import huggingface_hub

    return huggingface_hub

"""Test upload to and download from the hub, with a folder as the hub: the same bundle comes back and is checked."""

from __future__ import annotations

import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from twotower.bundle import hub
from twotower.bundle.hub import CARD, from_pretrained, push_to_hub
from twotower.errors import DataError
from twotower.retrieval.recommender import Recommender


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local hub with the functions of `huggingface_hub` that the module calls."""
    root = tmp_path / "remote"

    class Api:
        def __init__(self, token: str | None) -> None:
            assert token is None

        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
            assert private and exist_ok
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name / ".gitattributes").write_text("*.onnx filter=lfs")

        def upload_folder(self, *, repo_id: str, folder_path: str, delete_patterns: list[str], commit_message: str) -> str:
            assert delete_patterns == ["*"] and commit_message
            (root / repo_id / CARD).unlink(missing_ok=True)
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return "commit"

        def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str) -> None:
            (root / repo_id / path_in_repo).write_bytes(path_or_fileobj)

    def snapshot_download(name: str, *, revision: str | None, local_dir: str, token: str | None) -> None:
        assert revision is token is None
        shutil.copytree(root / name, local_dir, dirs_exist_ok=True)
        (Path(local_dir) / ".cache" / "huggingface").mkdir(parents=True)

    monkeypatch.setattr(hub, "_hub", lambda: SimpleNamespace(HfApi=Api, snapshot_download=snapshot_download))
    return root


def test_there_and_back(town_bundle: Path, remote: Path, tmp_path: Path) -> None:
    assert push_to_hub(town_bundle, "somebody/town") == "commit"
    said = (remote / "somebody" / "town" / CARD).read_text()
    assert said.startswith("---\n") and "NDCG@10 0.1000" in said and "categories (multi)" in said
    for number, source in enumerate(("somebody/town", str(remote / "somebody" / "town"))):
        out = from_pretrained(source, tmp_path / f"bundle{number}")
        one, other = Recommender.load(town_bundle), Recommender.load(out)
        assert one.bundle.manifest == other.bundle.manifest
        assert one.recommend(history=[], k=5) == other.recommend(history=[], k=5)


def test_what_was_changed_on_the_way_is_refused(town_bundle: Path, remote: Path, tmp_path: Path) -> None:
    push_to_hub(town_bundle, "somebody/town")
    (remote / "somebody" / "town" / "run.py").write_text("print()")
    with pytest.raises(DataError, match=r"run\.py is not in the manifest"):
        from_pretrained("somebody/town", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_the_calls_are_those_of_the_package(lacking: Any) -> None:
    """Check that the local hub has the arguments of the real functions."""
    import inspect

    if find_spec("huggingface_hub") is None:
        lacking("needs huggingface_hub: pip install two-tower-rec[hub]")
    huggingface_hub: Any = import_module("huggingface_hub")
    for function, wanted in (
        (huggingface_hub.HfApi.__init__, {"token"}),
        (huggingface_hub.HfApi.create_repo, {"private", "exist_ok"}),
        (huggingface_hub.HfApi.upload_folder, {"repo_id", "folder_path", "delete_patterns", "commit_message"}),
        (huggingface_hub.HfApi.upload_file, {"path_or_fileobj", "path_in_repo", "repo_id"}),
        (huggingface_hub.snapshot_download, {"revision", "local_dir", "token"}),
    ):
        assert wanted <= inspect.signature(function).parameters.keys()


def test_a_kaggle_model_is_a_bundle(town_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network: kagglehub finds a version in its cache."""
    from kagglehub.cache import Cache
    from kagglehub.handle import parse_model_handle

    from twotower.bundle.hub import from_kaggle, push_to_kaggle
    from twotower.bundle.sealed_folder import verify_manifest

    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    handle = parse_model_handle("ana/shop/other/default/1")
    cached = Path(Cache().get_path(handle))
    shutil.copytree(town_bundle, cached)
    Cache().mark_as_complete(handle)
    found = from_kaggle("ana/shop/other/default/1", tmp_path / "shop")
    assert verify_manifest(found) == verify_manifest(town_bundle)
    (cached / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="is not a bundle"):
        from_kaggle("ana/shop/other/default/1", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(DataError, match="cannot be downloaded"):
        from_kaggle("shop", tmp_path / "other")
    with pytest.raises(DataError, match="is not a bundle"):
        push_to_kaggle(tmp_path, "ana/shop/other/default")

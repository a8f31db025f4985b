"""Test signatures of bundles, and that no ONNX graph may refer to another file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from twotower.bundle.bundle import load_bundle
from twotower.bundle.onnx_towers import refuse_external_data
from twotower.bundle.revision import remove_items
from twotower.bundle.sealed_folder import MANIFEST, SIGNATURE, verify_manifest, write_manifest
from twotower.bundle.signature import read_trusted_key, sign_bundle
from twotower.cli import main
from twotower.errors import ConfigError, DataError
from twotower.schema import FIRST_ROW


def pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Return the files of a new private key and of its public key."""
    private = Ed25519PrivateKey.generate()
    (folder / f"{name}.key").write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / f"{name}.pub").write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return folder / f"{name}.key", folder / f"{name}.pub"


@pytest.fixture
def bundle(town_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(town_bundle, tmp_path / "bundle"))


def test_only_a_bundle_signed_for_the_trusted_key_is_opened(bundle: Path, tmp_path: Path) -> None:
    (ours, trusted), (theirs, _) = pair(tmp_path, "ours"), pair(tmp_path, "theirs")
    with pytest.raises(DataError, match="is not signed"):
        load_bundle(bundle, trusted)
    sign_bundle(bundle, theirs)
    with pytest.raises(DataError, match="is not that of the trusted key"):
        load_bundle(bundle, trusted)
    assert main(["--quiet", "sign", str(bundle), "--key", str(ours)]) == 0
    assert load_bundle(bundle, trusted).manifest == load_bundle(bundle).manifest == verify_manifest(bundle)


def test_a_changed_bundle_needs_a_new_signature(bundle: Path, tmp_path: Path) -> None:
    ours, trusted = pair(tmp_path, "ours")
    sign_bundle(bundle, ours)
    before = (bundle / SIGNATURE).read_bytes()
    item = str(load_bundle(bundle).dataset.item_ids[FIRST_ROW])
    remove_items(bundle, [item])
    assert not (bundle / SIGNATURE).exists()
    (bundle / SIGNATURE).write_bytes(before)
    with pytest.raises(DataError, match="is not that of the trusted key"):
        load_bundle(bundle, trusted)
    for content in (b"", before[:-1], before + b"x", b"\0" * 64):
        (bundle / SIGNATURE).write_bytes(content)
        with pytest.raises(DataError, match="is not that of the trusted key"):
            load_bundle(bundle, trusted)
    sign_bundle(bundle, ours)
    (bundle / MANIFEST).write_text((bundle / MANIFEST).read_text().replace('"revision": 1', '"revision": 2'))
    with pytest.raises(DataError, match="is damaged"):
        load_bundle(bundle, trusted)


def test_what_is_no_ed25519_key_is_refused_in_one_line(bundle: Path, tmp_path: Path) -> None:
    private, public = pair(tmp_path, "ours")
    rsa = generate_private_key(65537, 2048)
    (tmp_path / "rsa.key").write_bytes(rsa.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "rsa.pub").write_bytes(rsa.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    locked = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word"))
    (tmp_path / "locked.key").write_bytes(locked)
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    for file in (public, tmp_path / "rsa.key", tmp_path / "locked.key", tmp_path / "bytes", tmp_path / "nowhere"):
        with pytest.raises(ConfigError):
            sign_bundle(bundle, file)
    for file in (private, tmp_path / "rsa.pub", tmp_path / "bytes", tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError):
            read_trusted_key(file)


def tensor(external: bool = True) -> Any:
    made = onnx.helper.make_tensor("t", onnx.TensorProto.FLOAT, [2], [1.0, 2.0])
    if external:
        made.ClearField("float_data")
        made.data_location = onnx.TensorProto.EXTERNAL
        made.external_data.add(key="location", value="../../etc/passwd")
    return made


def in_weights(model: Any) -> None:
    model.graph.initializer.append(tensor())


def in_an_attribute(model: Any) -> None:
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=tensor()))


def in_a_list(model: Any) -> None:
    node = onnx.helper.make_node("Constant", [], ["c"])
    node.attribute.add(name="values", type=onnx.AttributeProto.TENSORS).tensors.append(tensor())
    model.graph.node.append(node)


def in_a_subgraph(model: Any) -> None:
    inner = onnx.helper.make_graph([], "inner", [], [], [tensor()])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner))


def in_a_function(model: Any) -> None:
    node = onnx.helper.make_node("Constant", [], ["c"], value=tensor())
    model.functions.append(onnx.helper.make_function("d", "f", [], ["c"], [node], [onnx.helper.make_opsetid("", 18)]))


def sparse(model: Any) -> None:
    model.graph.sparse_initializer.add().values.CopyFrom(tensor())


def only_named(model: Any) -> None:
    made = tensor(external=False)
    made.external_data.add(key="location", value="/etc/passwd")
    model.graph.initializer.append(made)


PLACES: list[Callable[[Any], None]] = [in_weights, in_an_attribute, in_a_list, in_a_subgraph, in_a_function, sparse, only_named]


@pytest.mark.parametrize("place", PLACES)
def test_a_graph_with_data_in_another_file_is_refused(bundle: Path, place: Callable[[Any], None]) -> None:
    file, manifest = bundle / "towers" / "user.onnx", verify_manifest(bundle)
    model = onnx.load(file)
    refuse_external_data(model.SerializeToString(), file)
    place(model)
    file.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="refers to data in another file"):
        refuse_external_data(file.read_bytes(), file)
    write_manifest(bundle, manifest)
    with pytest.raises(DataError, match="refers to data in another file"):
        load_bundle(bundle)

"""Sign bundles with Ed25519, and check the signature when a bundle is opened.

The signature covers the seal of the manifest, and through it every file. It is stored next to the manifest as `manifest.sig`.
A command that changes a bundle writes it without a signature: sign it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.bundle.sealed_folder import SIGNATURE, verify_manifest
from twotower.errors import ConfigError, DataError, require
from twotower.utils.atomic_files import atomic_file
from twotower.utils.manifests import BundleManifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SIGNATURE_BYTES = 64
HOW = "`twotower sign --help` shows how to make a pair."


def sign_bundle(bundle: Path, key: Path) -> None:
    """Sign a bundle with the private key in a PEM file.

    Raises
    ------
    DataError
        The bundle is damaged.
    ConfigError
        The file has no private Ed25519 key.
    """
    require("serve", "cryptography")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    private = _read(key, "private", lambda text: load_pem_private_key(text, None))
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(f"{key} has no private Ed25519 key. {HOW}")
    manifest = verify_manifest(bundle)
    with atomic_file(bundle / SIGNATURE) as beside:
        beside.write_bytes(private.sign(_signed(manifest)))


def read_trusted_key(file: Path) -> Ed25519PublicKey:
    """Return the public key in a PEM file.

    Raises
    ------
    ConfigError
        The file has no public Ed25519 key.
    """
    require("serve", "cryptography")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    public = _read(file, "public", load_pem_public_key)
    if not isinstance(public, Ed25519PublicKey):
        raise ConfigError(f"{file} has no public Ed25519 key. {HOW}")
    return public


def check_signature(bundle: Path, manifest: BundleManifest, key: Ed25519PublicKey) -> None:
    """Check that a verified manifest has been signed with the private part of `key`.

    Raises
    ------
    DataError
        The signature is missing or of another key or manifest.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        with (bundle / SIGNATURE).open("rb") as file:
            signature = file.read(SIGNATURE_BYTES + 1)
    except OSError:
        raise DataError(
            f"The bundle {bundle} is not signed, and only signed bundles are trusted. Sign it with `twotower sign`."
        ) from None
    try:
        key.verify(signature, _signed(manifest))
    except InvalidSignature:
        raise DataError(
            f"The signature of the bundle {bundle} is not that of the trusted key. Do not use this bundle, or sign it again."
        ) from None


def _signed(manifest: BundleManifest) -> bytes:
    return f"two-tower-rec bundle {manifest.seal}".encode()


def _read(file: Path, kind: str, load: Any) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return load(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"Cannot read the {kind} key {file}: {error.strerror}. Check the path and its permissions.") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):  # not a PEM file, encrypted, or of an unknown algorithm
        raise ConfigError(f"{file} has no {kind} Ed25519 key without password, as PEM. {HOW}") from None

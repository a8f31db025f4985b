"""Turn texts into vectors: TF-IDF reduced by a truncated SVD, or a sentence-transformers model reduced by principal components."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from twotower.errors import DataError, require
from twotower.utils.array_files import open_arrays, write_arrays
from twotower.utils.atomic_files import atomic_file
from twotower.utils.console import log
from twotower.utils.types import Array, Float

if TYPE_CHECKING:  # SciPy and scikit-learn import slowly, and serving does not need them
    from scipy.sparse import csr_matrix

Texts = list[str] | Any  # strings, or what `read_texts` makes of them
TFIDF, SENTENCES = "tfidf", "sentence-transformers/"
_HASH_BITS = 15
_DIGEST = 16  # bytes of a text's hash


def read_texts(texts: Texts, encoder: str = TFIDF) -> csr_matrix | Float:
    """Return what `fit_text` and `text_vectors` read; what is no list of strings is returned unchanged.

    Parameters
    ----------
    encoder
        "tfidf": the result is 1 + log(count) of the hashed words, float32 [n, 2^15], sparse. "sentence-transformers/NAME": the
        vectors of that model, float32 [n, width], from the cache where it has them.
    """
    if not isinstance(texts, list):
        return texts
    return _hashed_words(texts) if encoder == TFIDF else _sentence_vectors(texts, encoder.removeprefix(SENTENCES))


def fit_text(read: csr_matrix | Float, dim: int, seed: int) -> dict[str, Array]:
    """Return the arrays that `text_vectors` needs, fitted on training texts.

    Returns
    -------
    arrays
        "components" float32 [dim, width], and "idf" float32 [width] of TF-IDF or "mean" float32 [width] of sentence vectors.
    """
    from sklearn.preprocessing import normalize
    from sklearn.utils.extmath import randomized_svd

    width = min(dim, max(read.shape[0] - 1, 1), read.shape[1])
    components = np.zeros((dim, read.shape[1]), np.float32)
    # One thread: results must not depend on the number of cores, to the last bit.
    with threadpool_limits(1):
        if isinstance(read, np.ndarray):
            mean = read.mean(axis=0) if len(read) else np.zeros(read.shape[1], np.float32)
            if len(read) > 1:
                components[:width] = randomized_svd(read - mean, width, n_iter=4, random_state=seed)[2]
            return {"mean": mean.astype(np.float32), "components": components}
        documents = np.asarray((read > 0).sum(axis=0)).ravel()
        idf = (np.log((1 + read.shape[0]) / (1 + documents)) + 1).astype(np.float32)
        if width and read.nnz:
            weighted = normalize(read.multiply(idf).tocsr())
            components[:width] = randomized_svd(weighted, width, n_iter=4, random_state=seed)[2]
    return {"idf": idf, "components": components}


def text_vectors(arrays: dict[str, Array], read: csr_matrix | Float) -> Float:
    """Return vectors of length one, float32 [n, dim]; zeros for texts without words."""
    from sklearn.preprocessing import normalize

    if isinstance(read, np.ndarray):
        centred = np.where(read.any(axis=1, keepdims=True), read - arrays["mean"], 0)
        return np.asarray(normalize(centred @ arrays["components"].T), np.float32)
    weighted = normalize(read.multiply(arrays["idf"]).tocsr())
    return np.asarray(normalize(np.asarray(weighted @ arrays["components"].T, np.float32)), np.float32)


def _hashed_words(texts: Sequence[str | None]) -> csr_matrix:
    require("train", "scipy", "sklearn")
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        n_features=1 << _HASH_BITS, alternate_sign=False, norm=None, stop_words="english", dtype=np.float32
    )
    counts = vectorizer.transform([text or "" for text in texts])
    counts.data = 1 + np.log(counts.data)
    return counts


def _sentence_vectors(texts: Sequence[str | None], name: str) -> Float:
    """Return the vectors of texts by a sentence-transformers model, zeros for empty ones. New vectors are added to the cache."""
    digests = [hashlib.sha256((text or "").encode("utf-8", "replace")).digest()[:_DIGEST] for text in texts]
    file = cache_file(name)
    known = _cached(file)
    new = {digest: text for digest, text in zip(digests, texts, strict=True) if text and text.strip() and digest not in known}
    if new:
        log.info("text encoder %s: %s new texts of %s", name, f"{len(new):,}", f"{len(texts):,}")
        known |= dict(zip(new, _encode(name, list(new.values())), strict=True))
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as fresh:
            keys = np.frombuffer(b"".join(known), np.uint8).reshape(-1, _DIGEST)
            write_arrays(fresh, {"digests": keys, "vectors": np.stack(list(known.values()))})
    width = len(next(iter(known.values()))) if known else 1
    nothing = np.zeros(width, np.float32)
    return np.stack([known[digest] if text and text.strip() else nothing for digest, text in zip(digests, texts, strict=True)])


def cache_file(name: str) -> Path:
    """Return the file of the vectors that a model made: below TWOTOWER_CACHE, else ~/.cache/twotower.

    A folder is known by its path and the sizes and times of its files, so that a changed model has a file of its own.
    """
    marks = [name]
    if Path(name).is_dir():
        files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        marks += [f"{path.relative_to(name)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    mark = hashlib.sha256("\n".join(marks).encode()).hexdigest()[:16]
    base = Path(os.environ.get("TWOTOWER_CACHE") or Path.home() / ".cache" / "twotower")
    return base / "texts" / f"{Path(name).name}-{mark}.safetensors"


def _cached(file: Path) -> dict[bytes, Float]:
    if not file.is_file():
        return {}
    arrays = open_arrays(file)
    return dict(zip((row.tobytes() for row in arrays["digests"]), np.array(arrays["vectors"]), strict=True))


def _encode(name: str, texts: list[str]) -> Float:
    require("text", "sentence_transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries below, about each other
        from sentence_transformers import SentenceTransformer

        try:
            model = SentenceTransformer(name)
            return np.asarray(model.encode(texts, show_progress_bar=False, convert_to_numpy=True), np.float32)
        except (OSError, ValueError) as error:
            raise DataError(
                f"The text encoder {name!r} cannot be opened: {str(error)[:200]}. Expected a folder, or a name on the Hugging "
                "Face hub. Correct prepare.text_encoder."
            ) from None

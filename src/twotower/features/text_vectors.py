"""Turn texts into vectors: hashed words, TF-IDF weights and a truncated SVD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from twotower.errors import require
from twotower.utils.types import Array, Float

if TYPE_CHECKING:  # SciPy and scikit-learn import slowly, and serving does not need them
    from scipy.sparse import csr_matrix

Texts = list[str] | Any  # strings, or the sparse counts of their words
_HASH_BITS = 15


def hash_texts(texts: Texts) -> csr_matrix:
    """Return 1 + log(count) of the hashed words of each text, float32 [n, 2^15]; a sparse matrix is returned unchanged."""
    require("train", "scipy", "sklearn")
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import HashingVectorizer

    if isinstance(texts, csr_matrix):
        return texts
    vectorizer = HashingVectorizer(
        n_features=1 << _HASH_BITS, alternate_sign=False, norm=None, stop_words="english", dtype=np.float32
    )
    counts = vectorizer.transform([text or "" for text in texts])
    counts.data = 1 + np.log(counts.data)
    return counts


def fit_text(counts: csr_matrix, dim: int, seed: int) -> dict[str, Array]:
    """Return "idf" float32 [2^15] and "components" float32 [dim, 2^15] of the result of `hash_texts`."""
    from sklearn.preprocessing import normalize
    from sklearn.utils.extmath import randomized_svd

    documents = np.asarray((counts > 0).sum(axis=0)).ravel()
    idf = (np.log((1 + counts.shape[0]) / (1 + documents)) + 1).astype(np.float32)
    width = min(dim, max(counts.shape[0] - 1, 1))
    components = np.zeros((dim, 1 << _HASH_BITS), np.float32)
    if width and counts.nnz:
        # One thread: results must not depend on the number of cores, to the last bit.
        with threadpool_limits(1):
            weighted = normalize(counts.multiply(idf).tocsr())
            components[:width] = randomized_svd(weighted, width, n_iter=4, random_state=seed)[2]
    return {"idf": idf, "components": components}


def text_vectors(idf: Array, components: Array, texts: Texts) -> Float:
    """Return vectors float32 [n, dim] of length one, or zeros for a text without a word."""
    counts = hash_texts(texts)
    from sklearn.preprocessing import normalize

    weighted = normalize(counts.multiply(idf).tocsr())
    vectors = np.asarray(weighted @ components.T, np.float32)
    return np.asarray(normalize(vectors), np.float32)

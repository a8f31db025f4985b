"""Vectors of texts by a sentence-transformers model: a tiny random one, made here without network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import twotower as tt
from twotower.cli import main
from twotower.errors import ConfigError, DataError
from twotower.features import texts
from twotower.features.encoders import Encoders
from twotower.features.texts import cache_file, fit_text, read_texts, text_vectors
from twotower.utils.config import parse_config

from ..shop import FAST, NAMED, shop

WORDS = ("tea", "green", "black", "white", "of", "the", "hills", "smoky", "sweet", "first", "flush")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers and sixteen dimensions, with mean pooling, saved as a folder."""
    pytest.importorskip("sentence_transformers")
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("tiny")
    (folder / "bert").mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **shape)).save_pretrained(folder / "bert")
    words = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[words, Pooling(16)], device="cpu").save(str(folder / "model"))
    return folder / "model"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_vectors_are_the_models_own_and_made_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers import SentenceTransformer

    said = ["green tea", "black tea of the hills", None, "green tea", " "]
    found = read_texts(said, f"sentence-transformers/{tiny}")
    expected = SentenceTransformer(str(tiny)).encode([said[0], said[1]])
    np.testing.assert_allclose(found[[0, 1]], expected, atol=1e-6)
    assert not found[[2, 4]].any() and (found[0] == found[3]).all()
    made: list[list[str]] = []
    encode = texts._encode
    monkeypatch.setattr(texts, "_encode", lambda name, new: made.append(new) or encode(name, new))
    again = read_texts(["smoky", *said], f"sentence-transformers/{tiny}")
    assert made == [["smoky"]] and (again[1:] == found).all()
    read_texts(said, f"sentence-transformers/{tiny}")
    assert made == [["smoky"]]


def test_a_changed_model_has_a_cache_of_its_own(tiny: Path) -> None:
    before = cache_file(str(tiny))
    (tiny / "note.txt").write_text("changed")
    try:
        assert cache_file(str(tiny)) != before
    finally:
        (tiny / "note.txt").unlink()
    assert cache_file(str(tiny)) == before


def test_principal_components_keep_the_distances() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(40, 3)) @ rng.normal(size=(3, 16)) + 5).astype(np.float32)  # three dimensions in sixteen
    arrays = fit_text(vectors, 8, seed=0)
    assert arrays["components"].shape == (8, 16)
    centred = vectors - vectors.mean(axis=0)
    reduced = centred @ arrays["components"].T
    np.testing.assert_allclose(np.linalg.norm(reduced, axis=1), np.linalg.norm(centred, axis=1), rtol=1e-3)
    shown = text_vectors(arrays, np.concatenate([vectors, np.zeros((1, 16), np.float32)]))
    np.testing.assert_allclose(np.linalg.norm(shown, axis=1), [1] * 40 + [0], atol=1e-5)


def test_a_model_of_texts_by_sentences(tiny: Path, tmp_path: Path) -> None:
    """From the fit to new items: the bundle knows its encoder."""
    orders, products = shop(users=80, items=40, events=1500)
    rng = np.random.default_rng(1)
    products["story"] = [" ".join(rng.choice(WORDS, 6)) for _ in range(len(products))]
    settings = {**FAST, "training": {"max_steps": 3, "recipe": "fixed"}}
    settings["prepare"] = {"text_dim": 8, "text_encoder": f"sentence-transformers/{tiny}"}
    settings["data"] = {"items": {"features": [{"name": "story", "kind": "text"}]}}
    model = tt.Model(seed=0, verbose=0, **settings).fit(orders, items=products, **NAMED)
    encoders = model.dataset.encoders
    assert encoders.text_encoder.endswith(str(tiny)) and encoders.arrays["item.story.components"].shape == (8, 16)
    assert Encoders.load(model.dataset.path).text_encoder == encoders.text_encoder
    bundle = model.save(tmp_path / "shop")
    new = {"item_id": "P9999", "name": "New", "story": "smoky black tea", "brand": "Uji", "price": 5}
    (tmp_path / "new.jsonl").write_text(json.dumps(new) + "\n")
    assert main(["--quiet", "add-items", str(bundle), "--items", str(tmp_path / "new.jsonl")]) == 0
    assert len(tt.load(bundle).similar("P9999", k=3)) == 3


def test_wrong_encoders_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="text_encoder"):
        parse_config({"prepare": {"text_encoder": "word2vec"}})
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be opened"):
        read_texts(["tea"], f"sentence-transformers/{tmp_path / 'empty'}")

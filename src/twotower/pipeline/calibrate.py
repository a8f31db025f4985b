"""Fit what a trained model adds to the inner product of the towers, and store it in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from twotower.bundle.bundle import load_trained
from twotower.data.dataset import Dataset
from twotower.data.dataset_features import open_store, split_moment
from twotower.models.neural_retriever import NeuralRetriever
from twotower.trainers.calibration import calibrate, in_words
from twotower.trainers.new_item_popularity import calibrate_new_items
from twotower.utils.checkpoint import load_checkpoint, save_checkpoint
from twotower.utils.config import ResolvedConfig
from twotower.utils.console import log
from twotower.utils.documents import CalibrationRecord

TRAINED = "trained_priors"


def calibrate_run(
    config: ResolvedConfig, dataset: Dataset, checkpoint: Path, *, priors: Mapping[str, Tensor] | None = None, fit: bool = True
) -> CalibrationRecord | None:
    """Fit the weights of the score and the popularity of new items, store them in the checkpoint, and return the record of the fit.

    The checkpoint keeps the weights of the training too (`trained_priors`): a second call, as of a resumed run, begins with them.

    Parameters
    ----------
    priors
        Weights to begin with, by name of the tensor: those of the run that a refit or an update goes on from.
    fit
        False: the weights stay as they are, as in a refit, which has no validation part.
    """
    model, _, _ = load_trained(checkpoint, dataset)
    trained = load_checkpoint(checkpoint).get(TRAINED) or {name: value.clone() for name, value in model.priors.state_dict().items()}
    model.priors.load_state_dict(dict(trained if priors is None else priors))
    record = calibrate(model, dataset, config) if fit else None
    moment = split_moment(dataset, "valid")
    retriever = NeuralRetriever(model, open_store(dataset, "valid", config.model), n_item_rows=dataset.n_item_rows, time_s=moment)
    exposure = config.model.new_item_exposure
    found = calibrate_new_items(retriever, dataset, time_s=moment, exposure=exposure, seed=config.seed)
    model.priors.new_popularity.fill_(found)
    state = load_checkpoint(checkpoint) | {TRAINED: trained}
    state["model"].update({name: value for name, value in model.state_dict().items() if name.startswith("priors.")})
    save_checkpoint(checkpoint, state)
    if record is not None:
        log.info("%s", in_words(record))
    return record

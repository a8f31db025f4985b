"""Add popularity (at several half-lives) and distance to the score of the towers.

    score(u, i) = a_g ⟨u, i⟩ + T · Σ_h w_gh log popularity_h(i) + T · n_g · novelty(i) - T · c_g · distance²(u, i) / 2

h runs over the half-lives of events, and g is the group of the history length. Novelty is positive for items whose first events are
recent. It counts only where there are several half-lives, and so times. The score is one inner product: popularity columns and
location are appended to the item vector, and their weights to the user vector. The weights are fitted on the validation part as a
conditional logit (`trainers.calibration`). Before, all events have the same weight, and novelty and distance have none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twotower.features.transitions import TRANSITIONS
from twotower.models.history_terms import REPEATS
from twotower.search.reranking import POPULARITY_SCALE
from twotower.utils.types import Json

GROUPS = (0, 1, 5)
"""Smallest number of events in a history, by group: users without events, with few, and with more."""
LOCATION = 5
"""Columns of a location: three coordinates, the constant of the user, and that of the item."""


class Priors(nn.Module):
    """Weights of the towers, the popularities and the distance in a score.

    Parameters
    ----------
    prior
        `model.popularity_prior`: weight of the log popularity of all events, before the weights are fitted.
    half_lives
        Half-lives of the log popularities in days; the first is 0: all events count the same.
    """

    def __init__(self, prior: float, half_lives: tuple[float, ...]) -> None:
        super().__init__()
        self.popularities = len(half_lives) + (len(half_lives) > 1)
        """Number of columns H' of the popularity: one for each half-life, and the novelty."""
        weights = torch.zeros(len(GROUPS), 2 + self.popularities)
        weights[:, 0], weights[:, 1] = 1.0, prior
        self.prior, self.half_lives = prior, half_lives
        self.weights: Tensor
        """[G, 1 + H' + 1]: weights of the towers, the popularity columns (nats), and half the squared distance (1 / km²)."""
        self.register_buffer("weights", weights)
        self.centre: Tensor
        """[3], km: origin of the coordinates of locations."""
        self.register_buffer("centre", torch.zeros(3))
        self.unlocated: Tensor
        """Half the squared distance, in km², that an item without a location counts as."""
        self.register_buffer("unlocated", torch.zeros(()))
        self.recency: Tensor
        """Weight of the last items of the history in nats; see `models.history_terms`."""
        self.register_buffer("recency", torch.zeros(()))
        self.repeats: Tensor
        """[6]: weights of an item of the history where it may be recommended; see `models.history_terms`."""
        self.register_buffer("repeats", torch.zeros(REPEATS))
        self.transitions: Tensor
        """[4]: weights of an item after or before the last items of the history; see `models.history_terms`."""
        self.register_buffer("transitions", torch.zeros(TRANSITIONS))
        self.new_popularity: Tensor
        """Log popularity of new items, a scalar in nats; see `trainers.new_item_popularity`."""
        self.register_buffer("new_popularity", torch.zeros(()))

    @property
    def located(self) -> bool:
        """Return True if the distance has a weight."""
        return bool(self.weights[:, -1].any())

    @property
    def width(self) -> int:
        """Return the number of columns P after the vector of the tower."""
        return self.popularities + LOCATION * self.located

    def popularity(self, logs: Tensor, new: Tensor) -> Tensor:
        """Return the popularity columns [n, H'] of items, with a floor for the log popularities of new items.

        Parameters
        ----------
        logs
            float [n, H']: log popularities from events, NaN for an item without an event; then the novelty.
        new
            bool [n]: items that training has not seen. They get `new_popularity` until their own exceeds it.
        """
        counted, novelty = logs[:, : len(self.half_lives)], logs[:, len(self.half_lives) :]
        floored = torch.where(new[:, None], torch.fmax(counted, self.new_popularity.to(logs.dtype)), counted)
        return torch.cat([floored, novelty], dim=1)

    def item_columns(self, logs: Tensor, new: Tensor, points: Tensor) -> Tensor:
        """Return the columns [n, P] of items; `points` float [n, 3]: their points on the globe in km, NaN if unknown."""
        popularity = self.popularity(logs, new)
        return torch.cat([popularity, self.item_location(points).to(popularity)], dim=1) if self.located else popularity

    def item_location(self, points: Tensor) -> Tensor:
        """Return the location columns [n, 5] of items.

        The inner product with `user_location` is minus half the squared distance in km²; `unlocated` for items without a location.
        """
        at, known = self._centred(points)
        half = torch.where(known > 0, 0.5 * at.square().sum(1, keepdim=True), self.unlocated.to(at))
        return torch.cat([at, known, -half], dim=1)

    def user_location(self, points: Tensor) -> Tensor:
        """Return the location columns [B, 5] of users, zeros without a location."""
        at, known = self._centred(points)
        return torch.cat([at, -0.5 * at.square().sum(1, keepdim=True), known], dim=1)

    def user_columns(self, lengths: Tensor, points: Tensor, temperature: float, popularity_bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factor [B, 1] of the user vectors and the columns [B, P] that follow them.

        Parameters
        ----------
        lengths
            int64 [B]: events in each history.
        points
            float [B, 3]: location of each user on the globe in km, NaN if unknown.
        temperature
            The temperature: logits are inner products divided by it.
        popularity_bias
            float [B]: popularity bias, from -1 to 1.
        """
        chosen = self.weights[group(lengths)]
        columns = chosen[:, 1:-1] * temperature
        columns[:, 0] += popularity_bias * POPULARITY_SCALE
        if self.located:
            columns = torch.cat([columns, chosen[:, -1:] * temperature * self.user_location(points).to(columns)], dim=1)
        return chosen[:, :1], columns

    def popularity_weight(self, lengths: Tensor, temperature: float) -> Tensor:
        """Return the sum of the weights [B] of all log popularities in an inner product."""
        return self.weights[group(lengths), 1 : 1 + len(self.half_lives)].sum(dim=1) * temperature

    def as_json(self, temperature: float) -> Json:
        """Return the values that a client of the ONNX graphs needs to append the columns; see `bundle.onnx_towers`."""
        return {
            "groups": list(GROUPS),
            "half_lives_days": list(self.half_lives),
            "weights": [[round(value, 7) for value in row] for row in self.weights.tolist()],
            "centre_km": [round(value, 4) for value in self.centre.tolist()],
            "unlocated_km2": round(float(self.unlocated), 4),
            "recency": round(float(self.recency), 7),
            "repeats": [round(value, 7) for value in self.repeats.tolist()],
            "transitions": [round(value, 7) for value in self.transitions.tolist()],
            "temperature": temperature,
        }

    def _centred(self, points: Tensor) -> tuple[Tensor, Tensor]:
        known = ~torch.isnan(points).any(dim=1, keepdim=True)
        return torch.where(known, points - self.centre.to(points), 0.0), known.to(points)


def group(lengths: Tensor) -> Tensor:
    """Return the group of each history length, int64 [B].

    Examples
    --------
    >>> group(torch.tensor([0, 1, 4, 5, 80])).tolist()
    [0, 1, 1, 2, 2]
    """
    return torch.bucketize(lengths, torch.tensor(GROUPS[1:], device=lengths.device), right=True)

"""Build a simulated town: neighbourhoods, items and the tastes of the users.

The same random generator gives the same town. Users are built in pieces, so that memory is bounded by the parameters.
"""

from __future__ import annotations

import numpy as np

from twotower.data.simulator.town import END_S, START_S, STILL_OPEN, WEEK_S, WEEKS, Tastes, Truth
from twotower.data.simulator.vocabulary import Category, categories
from twotower.schema import DAY_S, HOURS_PER_WEEK
from twotower.utils.types import Array

YEAR_S = 365 * DAY_S
DIMENSIONS = 4
ALPHABET = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", np.uint8)


def build_town(users: int, businesses: int, rng: np.random.Generator, tastes: Tastes | None = None) -> Truth:
    """Return a new simulation: at least two towns of about 3,000 items each, in neighbourhoods of about 40."""
    leaves = categories()
    n_towns = int(np.clip(round(businesses / 3000), 3 if businesses >= 300 else 2, 96))
    homes = int(np.clip(businesses / n_towns / 40, 4, 60))
    share = 1 / np.sqrt(np.arange(1, n_towns + 1))
    place_town = np.repeat(np.arange(n_towns), homes)
    radius = 5 * np.sqrt(homes / 12) * np.sqrt(rng.random(len(place_town)))
    angle = rng.random(len(place_town)) * 2 * np.pi
    place_xy = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    place_weight = np.repeat(share, homes) * rng.lognormal(0, 0.6, len(place_town))
    means = _unit(rng.standard_normal((len(leaves), DIMENSIONS)))
    items = _build_items(businesses, leaves, means, place_xy, place_weight, rng)
    items["item_town"] = place_town[items.pop("place")].astype(np.int32)
    mass = np.bincount(items["item_category"], np.exp(items["item_log_pop"]), len(leaves))
    pieces = [
        _build_users(n, leaves, means, mass / mass.sum(), place_town, place_weight, rng)
        for n in np.diff(np.r_[np.arange(0, users, 50_000), users]).tolist()
    ]
    return Truth(
        tastes=tastes or Tastes(),
        **items,
        place_town=place_town.astype(np.int32),
        place_xy=place_xy.astype(np.float32),
        rhythm=np.stack([_rhythm(leaf.rhythm) for leaf in leaves]).astype(np.float32),
        **{name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]},
    )


def random_ids(n: int, rng: np.random.Generator) -> Array:
    """Return `n` random ids of 22 characters, like Yelp's: S22 [n]."""
    return np.asarray(ALPHABET[rng.integers(0, 64, (n, 22), np.uint8)].view("S22").ravel())


def _build_items(
    n: int, leaves: list[Category], means: Array, place_xy: Array, place_weight: Array, rng: np.random.Generator
) -> dict[str, Array]:
    weight = np.array([leaf.weight for leaf in leaves])
    category = rng.choice(len(leaves), n, p=weight / weight.sum())
    place = rng.choice(len(place_xy), n, p=place_weight / place_weight.sum())
    latent = _unit(means[category] + 0.5 * rng.standard_normal((n, DIMENSIONS)))
    usual = np.array([leaf.price for leaf in leaves])[category]
    price = np.where(usual > 0, np.clip(np.rint(usual + 0.8 * latent[:, 1] + 0.5 * rng.standard_normal(n)), 1, 4), 0)
    quality = rng.standard_normal(n)
    log_pop = -0.6 * np.log((1 + rng.permutation(n)) / n) + 0.3 * quality
    before = rng.random(n) < 0.45
    opened = np.where(before, START_S - rng.exponential(5 * YEAR_S, n), START_S + (END_S - START_S) * rng.random(n) ** 0.75).astype(
        np.int64
    )
    life = (YEAR_S / 2 + rng.exponential(5 * YEAR_S, n)).astype(np.int64)
    closed = np.where(rng.random(n) < 0.35, np.maximum(opened, START_S) + life, STILL_OPEN)
    closed = np.where(
        (closed > END_S) | (np.arange(n) < 8), STILL_OPEN, closed
    )  # a few are always open, so that every user can choose
    return {
        "item_id": random_ids(n, rng),
        "place": place,
        "item_xy": (place_xy[place] + 0.6 * rng.standard_normal((n, 2))).astype(np.float32),
        "item_category": category.astype(np.int32),
        "item_price": price.astype(np.int8),
        "item_log_pop": log_pop.astype(np.float32),
        "item_quality": quality.astype(np.float32),
        "item_latent": latent.astype(np.float32),
        "item_open_s": np.where(np.arange(n) < 8, START_S - YEAR_S, opened),
        "item_close_s": closed,
    }


def _build_users(
    n: int, leaves: list[Category], means: Array, share: Array, place_town: Array, place_weight: Array, rng: np.random.Generator
) -> dict[str, Array]:
    p = place_weight / place_weight.sum()
    home = rng.choice(len(p), n, p=p)
    homes = int((place_town == 0).sum())
    second = np.where(rng.random(n) < 0.9, home // homes * homes + rng.integers(0, homes, n), rng.choice(len(p), n, p=p))
    early = _unit(rng.standard_normal((n, DIMENSIONS)))
    late = _unit(early + 0.4 * rng.standard_normal((n, DIMENSIONS)))
    length = np.minimum(2.2 * rng.lognormal(0, 0.25, n), 3)[:, None, None]
    parents = sorted({leaf.parent for leaf in leaves})
    parent = np.array([parents.index(leaf.parent) for leaf in leaves])
    liking = (
        np.log(share + 1e-9)
        + 1.2 * early @ means.T
        + 0.8 * rng.standard_normal((n, len(parents)))[:, parent]
        + rng.gumbel(size=(n, len(leaves)))
    )
    favourite = np.argpartition(-liking, 4, axis=1)[:, :4]
    ends = rng.dirichlet(np.ones(4), (n, 2))
    loyalty = 2.2 * rng.lognormal(0, 0.4, n)[:, None, None]
    joined = START_S + (WEEKS * rng.random(n) ** 0.7).astype(np.int64) * WEEK_S
    return {
        "user_id": random_ids(n, rng),
        "user_place": np.stack([home, second], 1).astype(np.int32),
        "user_favourite": favourite.astype(np.int32),
        "user_favour": (loyalty * ends / np.maximum(share[favourite], 1e-4)[:, None]).astype(np.float32),
        "user_latent": (length * np.stack([early, late], 1)).astype(np.float32),
        "user_budget": np.clip(2.0 + 0.8 * rng.standard_normal(n), 0.5, 4.5).astype(np.float32),
        "user_habit": np.minimum(0.085 * rng.lognormal(0, 0.5, n), 0.6).astype(np.float32),
        "user_join_s": joined - rng.integers(0, 30 * DAY_S, n),
    }


def _rhythm(name: str) -> Array:
    """Return the demand at each of the 168 hours from Monday 00:00, at most 1."""
    day, hour = np.divmod(np.arange(HOURS_PER_WEEK), 24)
    weekend = day >= 5

    def around(peak: float, width: float) -> Array:
        gap = np.abs(hour - peak)
        return np.asarray(np.exp(-((np.minimum(gap, 24 - gap) / width) ** 2)))

    shapes = {
        "meal": around(12.5, 1.8) + 1.2 * around(19, 2.2) + 0.2 * weekend,
        "morning": around(9, 2.2) * (1 + 0.6 * weekend) + 0.25 * around(15, 2),
        "night": around(22.5, 2.8) * (0.4 + 0.8 * ((day == 4) | (day == 5)) + 0.2 * (day == 6)),
        "shop": around(15, 3.5) * (0.6 + 0.6 * weekend),
        "service": around(12, 4) * np.where(day == 6, 0.15, 1.0),
        "weekend": around(14, 4) * (0.35 + 0.9 * weekend),
    }
    shape = 0.03 + shapes[name]
    return np.asarray(shape / shape.max())


def _unit(x: Array) -> Array:
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))

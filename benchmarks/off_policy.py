"""How often the intervals of off-policy estimates hold the true value, on a simulated town.

    python benchmarks/off_policy.py --trials 100 --explore 0.05,0.2

A logging policy ranks by popularity and a noisy taste, and explores as a server does. Another policy ranks the candidates of the
first one by the true preferences, so all of its items can be shown. A user chooses a shown item with a probability that the town
knows, so the true value of both is known. Each trial draws users, lists and choices, and estimates the value of the other policy.
Prints how many of the trials have the true value in the 95 % interval, the mean error and the mean width. Some minutes on one core.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, commit, machine, tell

from twotower.data.simulator.simulate import simulate
from twotower.data.simulator.town import END_S, Truth
from twotower.evaluation.off_policy import LoggedLists, estimate, predict_outcomes
from twotower.retrieval.exploration import POOL, explored, pool_of, probabilities
from twotower.schema import TRUTH_FILE
from twotower.utils.types import Float64, Int

K = 10
CHOICES = 3.0  # of an item, per unit of its true probability


@dataclass(frozen=True)
class World:
    """Lists and truth of every user: chosen [U, N] probabilities, `logged` and `other` lists [U, K], pools of the logged lists."""

    chosen: Float64
    score: Float64
    logged: Int
    other: Int
    pools: list[Int]

    @property
    def value(self) -> float:
        """Return the true mean number of choices of a list of the other policy."""
        return float(np.take_along_axis(self.chosen, self.other, 1).sum(axis=1).mean())


def make_world(seed: int) -> World:
    """Simulate a town and rank its items by two policies."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        simulate(Path(folder), users=400, businesses=300, events=3000, seed=seed)
        truth = Truth.load(Path(folder) / TRUTH_FILE)
    users = [name.decode() for name in truth.user_id]
    log_p = truth.scores(users, np.full(len(users), END_S - 1)).astype(np.float64)
    open_items = np.flatnonzero((log_p > -1e8).all(axis=0))
    log_p = log_p[:, open_items]
    chosen = 1 - np.exp(-CHOICES * np.exp(log_p))
    popular = truth.item_log_pop[open_items].astype(np.float64)
    base = popular + 0.5 * log_p + rng.normal(0, 1.0, log_p.shape)
    order = np.argsort(-base, axis=1, kind="stable")
    logged, near = order[:, :K], order[:, K : K + POOL]
    few = np.argsort(popular, kind="stable")[: len(popular) // 5]
    pools = []
    for user in range(len(users)):
        best = few[np.argsort(-base[user, few], kind="stable")][: 2 * POOL]
        pools.append(pool_of(logged[user], [(near[user], base[user, near[user]]), (best, base[user, best])])[0])
    candidates = order[:, : K + POOL]
    score = log_p + rng.normal(0, 0.5, log_p.shape)
    better = np.argsort(-np.take_along_axis(score, candidates, 1), axis=1, kind="stable")[:, :K]
    return World(chosen, score, logged, np.take_along_axis(candidates, better, 1), pools)


def draw_log(world: World, users: int, lists: int, explore: float, rng: np.random.Generator) -> LoggedLists:
    """Draw lists and choices."""
    drawn = rng.integers(0, len(world.chosen), users)
    rows, chances, targets, rewards, scores = [], [], [], [], []
    own = [np.sort(world.other[user]) for user in drawn]
    for user, theirs in zip(drawn.tolist(), own, strict=True):
        none = np.zeros(K, np.float32)
        for _ in range(lists):
            pool = world.pools[user]
            shown = explored(world.logged[user], none, pool, np.zeros(len(pool), np.float32), explore, rng)
            rows.append(shown.rows)
            chances.append(shown.propensity)
            targets.append(np.isin(shown.rows, theirs).astype(np.float64))
            rewards.append((rng.random(K) < world.chosen[user, shown.rows]).astype(np.float64))
            scores.append(world.score[user, shown.rows])
    owner = np.repeat(np.arange(users), lists)
    fold, own_fold = np.repeat(owner % 2, K), np.repeat(np.arange(users) % 2, K)
    score, reward = np.concatenate(scores), np.concatenate(rewards)
    of_others = np.concatenate([world.score[user, theirs] for user, theirs in zip(drawn.tolist(), own, strict=True)])
    expected = predict_outcomes(score, reward, fold, of_others, own_fold).reshape(users, K).sum(axis=1)
    return LoggedLists(
        offsets=np.arange(users * lists + 1) * K,
        propensity=np.concatenate(chances),
        target=np.concatenate(targets),
        reward=reward,
        predicted=predict_outcomes(score, reward, fold, score, fold),
        slots=np.full(users * lists, float(K)),
        expected=np.repeat(expected, lists),
        user=owner,
    )


def measured(world: World, trials: int, users: int, lists: int, explore: float) -> list[dict[str, Any]]:
    """Return one row for each estimator."""
    found: dict[str, list[tuple[bool, float, float]]] = {name: [] for name in ("ips", "snips", "dr")}
    for trial in range(trials):
        estimates = estimate(draw_log(world, users, lists, explore, np.random.default_rng(1000 + trial)), resamples=400, seed=trial)
        for name, rows in found.items():
            one = getattr(estimates, name)
            rows.append((one.low <= world.value <= one.high, one.value - world.value, one.high - one.low))
    pool = float(np.mean([probabilities(K, len(one), explore)[1] for one in world.pools]))
    return [
        {
            "explore": explore,
            "lists": users * lists,
            "propensity_of_pool": round(pool, 5),
            "estimator": name,
            "trials": trials,
            "held": sum(held for held, _, _ in rows),
            "true_value": round(world.value, 4),
            "mean_error": round(float(np.mean([error for _, error, _ in rows])), 4),
            "mean_width": round(float(np.mean([width for _, _, width in rows])), 4),
        }
        for name, rows in found.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--users", type=int, default=800)
    parser.add_argument("--lists", type=int, default=3, help="lists of each user")
    parser.add_argument("--explore", default="0.05,0.2")
    parser.add_argument("--results", type=Path, default=RESULTS / "off_policy.jsonl", help="file the rows are appended to")
    given = parser.parse_args(arguments)
    began, world = time.perf_counter(), make_world(0)
    for explore in (float(one) for one in given.explore.split(",")):
        for row in measured(world, given.trials, given.users, given.lists, explore):
            tell({**row, "commit": commit(), "machine": machine()}, given.results)
    print(f"{time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

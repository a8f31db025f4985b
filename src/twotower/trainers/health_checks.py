"""Check the health of a training run after each validation, and give advice.

`monitor.py` collects one `ValidationStats` per validation; `diagnose` turns their history into `Advice` and is a pure function.
Every threshold is a constant in this module, with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from twotower.models.two_tower import TEMPERATURE_RANGE
from twotower.trainers.health_measurements import ID_TABLES, MOVED, BatchStats, VectorSpread

CONSECUTIVE_VALIDATIONS = 2
"""Consecutive validations that must agree: first values of a run are transient, and one validation may be chance."""
AT_CLAMP = 1.01
"""The temperature counts as clamped within one percent of a bound: one Adam step moves it by about as much."""
MIN_SPREAD_NATS = 0.5
"""Nats. If the scores of two vectors differ by less, the softmax ratio is below e^0.5 = 1.6: almost flat. Healthy runs on simulated
towns had at least 1.6, at temperatures from 0.01 to 0.12; runs with collapsed vectors had at most 0.25."""
MIN_RANK = 3.0
"""Directions. With fewer, items differ in little more than popularity and one preference. Healthy runs on towns had 3.5 or more."""
MAX_POPULARITY_SHARE = 0.75
"""Share of the popularity lift that one list for all users has: lists above three quarters of it are hardly personal. Healthy runs
on towns stayed below one half; runs on events without any preferences reached at least 0.8."""
MAX_MASKED_SHARE = 0.2
"""Share. If one candidate in five is a known positive of the user, many more are unknown positives and are treated as negatives."""
MAX_SAME_USER_SHARE = 0.25
"""Share of pairs. Its inverse is the effective number of users in a batch; below four, a step follows the preferences of a few."""
RISEN = 0.05
"""Nats by which the validation loss must exceed its minimum: 5 % of the perplexity."""
PAST_VALIDATIONS, PAST_SHARE = 3, 1 / 3
"""Validations since the best one, and their share of the run so far, from which a run counts as overfitting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationStats:
    """Measurements of one validation.

    Attributes
    ----------
    step, epoch
        When it happened, counted from the start of the run.
    metric
        `training.eval_metric` on the validation queries.
    training_loss, validation_loss
        Nats: mean since the previous validation; `question_loss`.
    temperature, learns_temperature
        Temperature of the softmax; whether it is trained.
    items, users, batch_stats
        See their types.
    popularity_lift, popular_lift
        `metrics.popularity_lift` of the recommended lists, and of those of the baseline "popular" for the same queries.
    coverage
        Share of the catalogue in the recommended lists.
    untrained
        Id tables whose row UNKNOWN has not moved from its initial value.
    """

    step: int
    epoch: int
    metric: float
    training_loss: float
    validation_loss: float
    temperature: float
    learns_temperature: bool
    items: VectorSpread
    users: VectorSpread
    batch_stats: BatchStats
    popularity_lift: float
    popular_lift: float
    coverage: float
    untrained: tuple[str, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ValidationStats:
        """Return the statistics from the output of `dataclasses.asdict`, also after a round trip through JSON."""
        parts = {
            "items": VectorSpread(**values["items"]),
            "users": VectorSpread(**values["users"]),
            "batch_stats": BatchStats(**values["batch_stats"]),
        }
        return cls(**{**values, **parts, "untrained": tuple(values["untrained"])})


@dataclass(frozen=True, slots=True)
class Advice:
    """Advice of one check.

    Attributes
    ----------
    name
        Name of the check, constant during a run.
    message
        The measured value, the threshold and what to change.
    """

    name: str
    message: str


def diagnose(history: Sequence[ValidationStats]) -> list[Advice]:
    """Return the advice for the latest validation.

    Parameters
    ----------
    history
        All validations so far, oldest first.

    Examples
    --------
    >>> diagnose([])
    []
    """
    found = [(name, check(history)) for name, check in CHECKS.items()] if history else []
    return [Advice(name, message) for name, message in found if message]


def advice_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the last message of every check in a training log, in order of first occurrence.

    Parameters
    ----------
    rows
        {"step", "advice": [{"name", "message"}, …]}; rows without "advice" are skipped.

    Examples
    --------
    >>> advice_lines([{"step": 1000, "advice": [{"name": "masked", "message": "Too many."}]}])
    ['Step 1,000: Too many.']
    """
    last: dict[str, str] = {}
    for row in rows:
        last |= {advice["name"]: f"Step {row['step']:,}: {advice['message']}" for advice in row.get("advice", ())}
    return list(last.values())


def _temperature(history: Sequence[ValidationStats]) -> str | None:
    low, high = TEMPERATURE_RANGE
    now = history[-1].temperature
    if not _persistently(
        history, lambda stats: stats.learns_temperature and not low * AT_CLAMP < stats.temperature < high / AT_CLAMP
    ):
        return None
    measured = (
        f"The temperature is {now:.3g}, at a bound of its range ({low:g} to {high:g}), for {CONSECUTIVE_VALIDATIONS} validations."
    )
    if now < 2 * low:
        return (
            f"{measured} The model is overconfident, which is typical of overfitting. Lower "
            "training.learning_rate, raise model.user_tower.dropout and model.item_tower.dropout, or fix the temperature: "
            "model.learn_temperature: false with model.temperature: 0.05."
        )
    return (
        f"{measured} The softmax is almost flat: the steps were too large, or the data has no signal. Lower "
        "training.learning_rate (or raise training.warmup_frac, which makes the first steps smaller), or fix the temperature: "
        "model.learn_temperature: false with model.temperature: 0.1."
    )


def _collapse(history: Sequence[ValidationStats]) -> str | None:
    sides: dict[str, Callable[[ValidationStats], VectorSpread]] = {
        "items": lambda stats: stats.items,
        "users": lambda stats: stats.users,
    }
    for name, of in sides.items():
        if not _persistently(history, partial(_fallen_together, of)):
            continue
        now, temperature = of(history[-1]), history[-1].temperature
        return (
            f"The vectors of the {name} have collapsed: their mean cosine is {now.cosine:.3f}. At temperature {temperature:.3g} "
            f"the scores of two of them differ by {_nats(now, temperature):.2g} nats; at least {MIN_SPREAD_NATS:g} are expected. "
            "Lower training.learning_rate, or model.temperature if it is not learned. Ignore this if the data has no "
            "preferences beyond popularity."
        )
    return None


def _fallen_together(of: Callable[[ValidationStats], VectorSpread], stats: ValidationStats) -> bool:
    return _nats(of(stats), stats.temperature) < MIN_SPREAD_NATS


def _dimensions(history: Sequence[ValidationStats]) -> str | None:
    """Check for dimensional collapse of the item vectors (Jing et al., "Understanding Dimensional Collapse in Contrastive
    Self-supervised Learning", ICLR 2022).

    User vectors are not checked: users may differ in little but their home area, as long as the item vectors differ.
    """
    if not _persistently(history, lambda stats: stats.items.rank < MIN_RANK):
        return None
    return (
        f"The item vectors have an effective rank of {history[-1].items.rank:.1f}; at least {MIN_RANK:g} is expected. Raise the "
        "last entry of hidden_dims of model.user_tower and model.item_tower if it is small, raise training.negatives_per_positive, "
        "and lower training.learning_rate, or model.temperature if it is near 1."
    )


def _popularity(history: Sequence[ValidationStats]) -> str | None:
    def hardly_personal(stats: ValidationStats) -> bool:
        return stats.popular_lift > 0 and stats.popularity_lift > MAX_POPULARITY_SHARE * stats.popular_lift

    if not _persistently(history, hardly_personal):
        return None
    now = history[-1]
    return (
        f"All users get almost the same list: its popularity lift is {now.popularity_lift:.2f}, more than "
        f"{MAX_POPULARITY_SHARE:g} of the lift of the most popular items ({now.popular_lift:.2f}), and the lists cover "
        f"{now.coverage:.1%} of the catalogue. Lower model.user_tower.history_dropout, dropout and id_dropout, or "
        "model.popularity_prior, train longer, or use training.loss: infonce with more training.negatives_per_positive."
    )


def _masked(history: Sequence[ValidationStats]) -> str | None:
    now = history[-1].batch_stats
    advice = (
        f"They are masked, and {now.negatives:.0f} negatives remain. Raise training.negatives_per_positive or use "
        "training.loss: full_softmax, and with training.objective: next_event raise training.batch_size. Ignore this if most "
        "users have events with much of the catalogue."
    )
    return _above(now.masked, MAX_MASKED_SHARE, "of the candidates of an example are positives of the same user", advice)


def _same_user(history: Sequence[ValidationStats]) -> str | None:
    share = history[-1].batch_stats.same_user
    advice = (
        f"A batch has {1 / (share or 1):.1f} effective users. Raise training.batch_size (training.micro_batch_size "
        "bounds the memory), or use training.objective: any_event."
    )
    return _above(share, MAX_SAME_USER_SHARE, "of the pairs of examples in a batch belong to one user", advice)


def _above(share: float, most: float, what: str, advice: str) -> str | None:
    return None if share <= most else f"{share:.1%} {what}; at most {most:.0%} are expected. {advice}"


def _validation_loss(history: Sequence[ValidationStats]) -> str | None:
    lowest = min(range(len(history)), key=lambda i: history[i].validation_loss)
    best = max(range(len(history)), key=lambda i: history[i].metric)
    now, low = history[-1], history[lowest]
    if now.validation_loss - low.validation_loss <= RISEN or best <= lowest:
        return None
    return (
        f"The validation loss rose from {low.validation_loss:.3f} at step {low.step:,} to {now.validation_loss:.3f}, while the "
        f"metric rose from {low.metric:.4f} to {history[best].metric:.4f}. This is normal for contrastive losses with a falling "
        "temperature or large tables: the loss penalises confident errors, ranking metrics do not. No change is needed: "
        "training.eval_metric decides which model is kept and when training stops."
    )


def _best_is_past(history: Sequence[ValidationStats]) -> str | None:
    best = max(range(len(history)), key=lambda i: history[i].metric)
    past, now = len(history) - 1 - best, history[-1]
    if not history[best].metric:
        return None  # nothing was ever found: no validation is the best one
    share = 1 - history[best].step / now.step if now.step else 0.0
    if past < PAST_VALIDATIONS or share < PAST_SHARE:
        return None
    fallen = round(history[best].training_loss - now.training_loss, 3)
    why = "The training loss did not change meanwhile."
    if fallen > 0:
        why = (
            f"The training loss fell by {fallen:.3f} meanwhile: the model is overfitting. Raise dropout and id_dropout of "
            "model.user_tower and model.item_tower, or training.weight_decay."
        )
    elif fallen < 0:
        why = f"The training loss rose by {-fallen:.3f} meanwhile: training is unstable. Lower training.learning_rate."
    return (
        f"The best result ({history[best].metric:.4f}) was at step {history[best].step:,} of {now.step:,}; the {past} validations "
        f"since were not better. {why} To save time, lower training.patience, or set training.num_epochs to about "
        f"{history[best].epoch + 1}, so that the learning rate has decayed by then."
    )


def _unknown(history: Sequence[ValidationStats]) -> str | None:
    untrained = history[-1].untrained
    if not untrained:
        return None
    rows = " and ".join(f"{table} (model.{ID_TABLES[table]}.id_dropout)" for table in untrained)
    return (
        f"The row UNKNOWN was not trained (its norm is below {MOVED:.0%} of an initial row's) in {rows}: new users or items get no "
        "learned vector. Set that id_dropout above 0, such as 0.1. Ignore this if all users and items are known."
    )


CHECKS: dict[str, Callable[[Sequence[ValidationStats]], str | None]] = {
    "temperature": _temperature,
    "collapse": _collapse,
    "dimensions": _dimensions,
    "popularity": _popularity,
    "masked": _masked,
    "same_user": _same_user,
    "validation_loss": _validation_loss,
    "best_is_past": _best_is_past,
    "unknown": _unknown,
}


def _persistently(history: Sequence[ValidationStats], sick: Callable[[ValidationStats], bool]) -> bool:
    return len(history) >= CONSECUTIVE_VALIDATIONS and all(sick(stats) for stats in history[-CONSECUTIVE_VALIDATIONS:])


def _nats(spread: VectorSpread, temperature: float) -> float:
    """Return the mean difference of scores, in nats, between a vector and another one."""
    return (1 - spread.cosine) / temperature

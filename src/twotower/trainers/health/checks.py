"""Health checks of a training: what each validation finds out about a run's health, and plain advice about it.

Enters: `ValidationStats`, one for each validation (`monitor.py` finds them). Leaves: `Advice`, from their history.

Promise: `diagnose` is a pure function of the statistics it is given. Every threshold is a constant here, with its reason beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from twotower.models.two_tower import TEMPERATURE_RANGE
from twotower.trainers.health.measurements import ID_TABLES, MOVED, BatchStats, VectorSpread

CONSECUTIVE_VALIDATIONS = 2
"""Validations in a row that must agree: a run's first figures pass, and one validation may be chance."""
AT_CLAMP = 1.01
"""Within one percent of a bound the temperature counts as clamped: a step of Adam moves it by about as much."""
MIN_SPREAD_NATS = 0.5
"""Nats. Where the scores of two vectors differ by less, the softmax prefers one less than e^0.5 = 1.6 times: it is almost flat.
Healthy runs over simulated towns had 1.6 and more, at temperatures from 0.01 to 0.12; runs whose vectors had fallen together had
0.25 and less."""
MIN_RANK = 3.0
"""Directions. With fewer, popularity and one taste are all that tells items apart. Healthy runs over towns had 3.5
and more."""
MAX_POPULARITY_SHARE = 0.75
"""Of the popularity lift of one list for everybody: lists that go three quarters of that way are hardly personal. Healthy runs over
towns stayed below half, runs over visits without any taste came to 0.8 and more."""
MAX_MASKED_SHARE = 0.2
"""Share. Where one candidate in five is known as a positive of the user, many more are without our knowing, and are pushed away."""
MAX_SAME_USER_SHARE = 0.25
"""Share of pairs; its inverse is how many users a batch is worth: fewer than four, and a step follows the taste of a few."""
RISEN = 0.05
"""Nats by which the validation loss must stand above its lowest: 5 % of the perplexity."""
PAST_VALIDATIONS, PAST_SHARE = 3, 1 / 3
"""Validations since the best, and their share of the run so far, from which on the best is long past."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationStats:
    """What one validation found.

    Attributes
    ----------
    step, epoch
        When, counted from the beginning.
    metric
        `training.eval_metric` of the validation questions.
    training_loss, validation_loss
        Nats: mean since the validation before; `question_loss`.
    temperature, learns_temperature
        Its value; whether it is trained.
    items, users, batch_stats
        See their types.
    popularity_lift, popular_lift
        `metrics.popularity_lift` of the lists recommended, and of those of the baseline "popular" for the same questions.
    coverage
        Share of the catalogue in the lists recommended.
    untrained
        Id tables whose row UNKNOWN is where it began.
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
        """What `dataclasses.asdict` took apart, and JSON may have carried."""
        parts = {
            "items": VectorSpread(**values["items"]),
            "users": VectorSpread(**values["users"]),
            "batch_stats": BatchStats(**values["batch_stats"]),
        }
        return cls(**{**values, **parts, "untrained": tuple(values["untrained"])})


@dataclass(frozen=True, slots=True)
class Advice:
    """What is wrong: a name that stays the same during a run, and sentences: measured, the threshold, what to change."""

    name: str
    message: str


def diagnose(history: Sequence[ValidationStats]) -> list[Advice]:
    """Everything that the latest of the validations, oldest first, gives reason to say."""
    found = [(name, check(history)) for name, check in CHECKS.items()] if history else []
    return [Advice(name, message) for name, message in found if message]


def advice_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The last message of every advice in rows {"step", "advice": [{"name", "message"}, …]} of a training log, in the order of
    their first."""
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
        f"The temperature is {now:.3g}, at a bound of its range of {low:g} to {high:g}, for {CONSECUTIVE_VALIDATIONS} validations."
    )
    if now < 2 * low:
        return (
            f"{measured} The model wants to be surer than it may, as when it learns the training part by heart. Lower "
            "training.learning_rate, raise model.user_tower.dropout and model.item_tower.dropout, or fix it: "
            "model.learn_temperature: false with model.temperature: 0.05."
        )
    return (
        f"{measured} So warm a softmax hardly prefers anything: the steps were too large, or there is nothing to learn. Lower "
        "training.learning_rate (training.warmup_frac makes the first steps smaller), or fix it: model.learn_temperature: false "
        "with model.temperature: 0.1."
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
            f"The vectors of the {name} have fallen together: their mean cosine is {now.cosine:.3f}. At temperature "
            f"{temperature:.3g} two of them differ by {_nats(now, temperature):.2g} nats, less than {MIN_SPREAD_NATS:g}. Lower "
            "training.learning_rate, or a model.temperature that is not learned. Where popularity is all there is, it is so."
        )
    return None


def _fallen_together(of: Callable[[ValidationStats], VectorSpread], stats: ValidationStats) -> bool:
    return _nats(of(stats), stats.temperature) < MIN_SPREAD_NATS


def _dimensions(history: Sequence[ValidationStats]) -> str | None:
    """Jing et al., "Understanding Dimensional Collapse in Contrastive Self-supervised Learning" (ICLR 2022).

    Of the items alone: users may well differ in little but where they live, as long as the items can be told apart.
    """
    if not _persistently(history, lambda stats: stats.items.rank < MIN_RANK):
        return None
    return (
        f"The vectors of the items use {history[-1].items.rank:.1f} directions (effective rank), fewer than {MIN_RANK:g}. Widen "
        "the last of hidden_dims of model.user_tower and model.item_tower where it is small, raise "
        "training.negatives_per_positive, and lower training.learning_rate, or model.temperature if it is near 1."
    )


def _popularity(history: Sequence[ValidationStats]) -> str | None:
    def hardly_personal(stats: ValidationStats) -> bool:
        return stats.popular_lift > 0 and stats.popularity_lift > MAX_POPULARITY_SHARE * stats.popular_lift

    if not _persistently(history, hardly_personal):
        return None
    now = history[-1]
    return (
        f"What is recommended is nearly one list for everybody: its popularity lift is {now.popularity_lift:.2f}, more than "
        f"{MAX_POPULARITY_SHARE:g} of the {now.popular_lift:.2f} that the most popular items have, and it shows "
        f"{now.coverage:.1%} of the catalogue. Users hardly count: lower model.user_tower.history_dropout, dropout and id_dropout, "
        "or model.popularity_prior, train longer, or use training.loss: infonce with more training.negatives_per_positive."
    )


def _masked(history: Sequence[ValidationStats]) -> str | None:
    now = history[-1].batch_stats
    if now.masked <= MAX_MASKED_SHARE:
        return None
    return (
        f"{now.masked:.1%} of the candidates of an example are its own user's positives, more than {MAX_MASKED_SHARE:.0%}; they "
        f"are left out, and {now.negatives:.0f} negatives remain. Raise training.negatives_per_positive or use training.loss: "
        "full_softmax, and with training.objective: next_event raise training.batch_size. Nothing helps where "
        "everybody has visited much of the catalogue."
    )


def _same_user(history: Sequence[ValidationStats]) -> str | None:
    now = history[-1].batch_stats
    if now.same_user <= MAX_SAME_USER_SHARE:
        return None
    return (
        f"{now.same_user:.1%} of the pairs of examples in a batch belong to one user, more than {MAX_SAME_USER_SHARE:.0%}: it is "
        f"worth {1 / now.same_user:.1f} users. Raise training.batch_size (training.micro_batch_size bounds the memory), or use "
        "training.objective: any_event."
    )


def _validation_loss(history: Sequence[ValidationStats]) -> str | None:
    lowest = min(range(len(history)), key=lambda i: history[i].validation_loss)
    best = max(range(len(history)), key=lambda i: history[i].metric)
    now, low = history[-1], history[lowest]
    if now.validation_loss - low.validation_loss <= RISEN or best <= lowest:
        return None
    return (
        f"The validation loss rose from {low.validation_loss:.3f} at step {low.step:,} to {now.validation_loss:.3f}, while the "
        f"metric rose from {low.metric:.4f} to {history[best].metric:.4f}. That is normal for contrastive losses with a falling "
        "temperature or large tables: the loss charges for being sure where the answer is missed, ranks do not. Nothing need "
        "change: training.eval_metric decides which model is kept and when to stop."
    )


def _best_is_past(history: Sequence[ValidationStats]) -> str | None:
    best = max(range(len(history)), key=lambda i: history[i].metric)
    past, now = len(history) - 1 - best, history[-1]
    share = 1 - history[best].step / now.step if now.step else 0.0
    if past < PAST_VALIDATIONS or share < PAST_SHARE:
        return None
    fallen = history[best].training_loss - now.training_loss
    why = (
        f"The training loss fell by {fallen:.3f} meanwhile: the training part is learned by heart. Raise dropout and id_dropout of "
        "model.user_tower and model.item_tower, or training.weight_decay."
        if fallen > 0
        else f"The training loss rose by {-fallen:.3f} meanwhile: lower training.learning_rate."
    )
    return (
        f"The best validation is {past} validations past (at least {PAST_VALIDATIONS} are long): {history[best].metric:.4f} at "
        f"step {history[best].step:,} of {now.step:,}. {why} To save the time, lower training.patience, or training.num_epochs "
        f"to about {history[best].epoch + 1}, so that the learning rate has fallen by then."
    )


def _unknown(history: Sequence[ValidationStats]) -> str | None:
    untrained = history[-1].untrained
    if not untrained:
        return None
    rows = " and ".join(f"{table} (model.{ID_TABLES[table]}.id_dropout)" for table in untrained)
    return (
        f"The row UNKNOWN lies where it began, within {MOVED:.0%} of a row's length of zero, in {rows}: training never saw what to "
        "make of whoever comes later. Set that id_dropout above 0, such as 0.1; without anybody new it may stay."
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
    """By how much the score of one vector falls, on average, where it is exchanged for another."""
    return (1 - spread.cosine) / temperature

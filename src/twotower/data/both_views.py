"""Both views of the training events in one run: batches of the any-event and of the next-event objective take turns.

The model reads histories left to right in both. So one model learns what goes together from whole histories, and what comes next
from their order.
"""

from __future__ import annotations

import numpy as np

from twotower.config import Config
from twotower.data.views import CausalView, Examples, Int, SetView, TrainEvents, View
from twotower.features import FeatureStore

TOKENS_AN_EXAMPLE = 8  # of the token budget, for each example of the set view


class MixedView:
    """As many batches of one view as of the other. The members of the set view are numbered after those of the causal view.

    `training.batch_size` is the token budget of the causal batches; the others have an example for every eight tokens.
    """

    def __init__(self, events: TrainEvents, store: FeatureStore, config: Config) -> None:
        self.causal = CausalView(events, store, config)
        examples = max(config.training.batch_size // TOKENS_AN_EXAMPLE, 2)
        training = config.training.model_copy(update={"batch_size": examples})
        self.sets = SetView(events, store, config.model_copy(update={"training": training}))
        self.begin = len(self.causal.start)
        self.targets, self.idle = np.concatenate([self.causal.targets, self.sets.targets]), self.causal.idle

    def plan(self, rng: np.random.Generator) -> list[Int]:
        """Batches of either view in turn."""
        causal, sets = self.causal.plan(rng), self.sets.plan(rng)
        return [part for i, batch in enumerate(causal) for part in (batch, sets[i % len(sets)] + self.begin)]

    def is_of_sets(self, members: Int) -> bool:
        """Return whether these are members of the set view; no members count as causal."""
        return bool(len(members)) and bool(members[0] >= self.begin)

    def _of(self, members: Int) -> tuple[View, Int]:
        return (self.sets, members - self.begin) if self.is_of_sets(members) else (self.causal, members)

    def size(self, members: Int) -> int:
        """See `View`."""
        view, own = self._of(members)
        return view.size(own)

    def asked_events(self, members: Int) -> Int:
        """See `View`."""
        view, own = self._of(members)
        return view.asked_events(own)

    def owner(self, members: Int) -> Int:
        """See `View`."""
        view, own = self._of(members)
        return view.owner(own)

    def examples(self, members: Int, rng: np.random.Generator) -> Examples:
        """See `View`."""
        view, own = self._of(members)
        return view.examples(own, rng)


VIEWS: dict[str, type[SetView] | type[CausalView] | type[MixedView]] = {"set": SetView, "causal": CausalView, "both": MixedView}

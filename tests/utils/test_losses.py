"""Test the losses against closed forms: estimates of sampled losses, sign of the correction, effect of a mask."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from twotower.data.candidates import LOSSES, Pool, full_softmax, infonce, other_positives, sampled_softmax
from twotower.schema import FIRST_ROW
from twotower.utils.losses import Masked, Negatives, softmax_loss

N, D, Q = 40, 8, 16
TEMPERATURE = torch.tensor(0.3, dtype=torch.float64)


@pytest.fixture
def world() -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    """Return users, items (all rows), a skewed popularity, and targets drawn from it."""
    rng = np.random.default_rng(0)
    count = np.zeros(N + FIRST_ROW, np.int64)
    count[FIRST_ROW:] = 1 + (200 / np.arange(1, N + 1)).astype(np.int64)
    users = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(Q, D))), dim=1)
    items = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(N + FIRST_ROW, D))), dim=1)
    target = rng.choice(N + FIRST_ROW, Q, p=count / count.sum())
    return users, items, count, target


def gradient(users: torch.Tensor, items: torch.Tensor, candidates) -> torch.Tensor:
    """Return the gradient of the loss with respect to the users [Q, D]."""
    leaf = users.clone().requires_grad_()
    loss = softmax_loss(
        leaf,
        items[candidates.row],
        target=torch.from_numpy(candidates.target),
        log_weight=torch.from_numpy(candidates.log_weight).double(),
        masked=None,
        temperature=TEMPERATURE,
    )
    return torch.autograd.grad(loss, leaf)[0]


def exact_gradient(users: torch.Tensor, items: torch.Tensor, target: np.ndarray) -> torch.Tensor:
    """Return the gradient of the full softmax in closed form: (Σ_j P_j v_j − v₊) / (T Q)."""
    live = items[FIRST_ROW:]
    probability = torch.softmax(users @ live.T / TEMPERATURE, dim=1)
    return (probability @ live - items[target]) / (TEMPERATURE * len(target))


def test_full_softmax_is_the_closed_form(world):
    users, items, count, target = world
    candidates = full_softmax(target, Pool.of(count), 0, np.random.default_rng(0))
    torch.testing.assert_close(gradient(users, items, candidates), exact_gradient(users, items, target))


def test_a_prior_is_part_of_every_logit(world):
    """With a prior, the loss and its gradients are those of the full softmax of the logits plus the prior."""
    users, items, count, target = world
    candidates = full_softmax(target, Pool.of(count), 0, np.random.default_rng(0))
    prior = torch.from_numpy(np.log(count[candidates.row]))
    leaves = [leaf.clone().requires_grad_() for leaf in (users, items[candidates.row], TEMPERATURE)]
    column = torch.from_numpy(candidates.target)
    loss = softmax_loss(
        leaves[0], leaves[1], target=column, log_weight=torch.zeros_like(prior), masked=None, temperature=leaves[2], prior=prior,
        block=5 * len(prior),
    )  # fmt: skip
    plain = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].T / leaves[2] + prior, column)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-9)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["infonce", "sampled_softmax"])
def test_sampled_gradient_nears_the_full_one_as_negatives_grow(world, name):
    users, items, count, target = world
    exact = exact_gradient(users, items, target)
    errors = []
    for draws in (50, 500, 5000, 50_000):
        rng = np.random.default_rng(1)
        mean = sum(gradient(users, items, LOSSES[name](target, Pool.of(count), draws, rng)) for _ in range(8)) / 8
        errors.append(float((mean - exact).norm() / exact.norm()))
    assert errors[-1] < 0.01
    assert all(later < 0.6 * earlier for earlier, later in pairwise(errors)), errors


def in_batch_error(users, items, count, sign: float) -> float:
    """Return the relative error of the mean gradient with in-batch negatives only, if log q is subtracted `sign` times."""
    rng = np.random.default_rng(2)
    total, exact = torch.zeros_like(users[0]), torch.zeros_like(users[0])
    for _ in range(100):
        target = rng.choice(N + FIRST_ROW, 256, p=count / count.sum())
        user = users[:1].expand(256, -1)
        candidates = infonce(target, Pool.of(count), 0, rng)
        log_q = np.log(255 * count[candidates.row] / count.sum())
        log_times = candidates.log_weight + log_q
        changed = replace(candidates, log_weight=(log_times - sign * log_q).astype(np.float32))
        total += gradient(user, items, changed).sum(dim=0)
        exact += exact_gradient(user, items, target).sum(dim=0)
    return float((total - exact).norm() / exact.norm())


def test_sign_of_the_correction(world):
    """In-batch negatives follow popularity: subtracting log q corrects that, adding it makes it worse."""
    users, items, count, _ = world
    right, none, wrong = (in_batch_error(users, items, count, sign) for sign in (1.0, 0.0, -1.0))
    assert right < 0.1 < none < wrong, (right, none, wrong)


def test_classical_logq_is_further_from_the_full_softmax(world):
    """Correcting the positive too (the classical logQ) overweights rare items; the corrected logQ does not."""
    users, items, count, _ = world
    rng, rare, user = np.random.default_rng(3), N + FIRST_ROW - 1, users[:1]
    corrected, classical = torch.zeros_like(user), torch.zeros_like(user)
    for _ in range(300):
        others = rng.choice(N + FIRST_ROW, 127, p=count / count.sum())
        candidates = infonce(np.append(rare, others), Pool.of(count), 0, rng)
        first = replace(candidates, target=candidates.target[:1])
        corrected += gradient(user, items, first) / 300
        leaf = user.clone().requires_grad_()
        logits = leaf @ items[candidates.row].T / TEMPERATURE + torch.from_numpy(candidates.log_weight).double()
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(first.target))
        classical += torch.autograd.grad(loss, leaf)[0] / 300
    exact = exact_gradient(user, items, np.array([rare]))
    errors = [float((found - exact).norm() / exact.norm()) for found in (corrected, classical)]
    assert errors[0] < 0.03 < errors[1], errors


def test_masked_positives_leave_the_sum(world):
    users, items, count, target = world
    candidates = full_softmax(target, Pool.of(count), 0, np.random.default_rng(0))
    column = int((candidates.target[0] + 1) % N)
    arguments = {"target": torch.from_numpy(candidates.target), "log_weight": torch.zeros(N), "temperature": TEMPERATURE}
    plain = softmax_loss(users, items[candidates.row], masked=None, **arguments)
    masked = softmax_loss(users, items[candidates.row], masked=Masked.of(np.array([0]), np.array([column]), Q), **arguments)
    scores = users[0] @ items[FIRST_ROW:].T / TEMPERATURE
    others = torch.cat([scores[:column], scores[column + 1 :]])
    by_hand = plain - (torch.logsumexp(scores, 0) - torch.logsumexp(others, 0)) / Q
    torch.testing.assert_close(masked, by_hand)
    assert masked < plain


def test_weights_average(world):
    users, items, count, target = world
    candidates = full_softmax(target, Pool.of(count), 0, np.random.default_rng(0))
    arguments = {"log_weight": torch.zeros(N), "masked": None, "temperature": TEMPERATURE}
    each = [
        softmax_loss(users[i : i + 1], items[candidates.row], target=torch.from_numpy(candidates.target[i : i + 1]), **arguments)
        for i in range(Q)
    ]
    weight = torch.arange(Q, dtype=torch.float64)
    both = softmax_loss(users, items[candidates.row], target=torch.from_numpy(candidates.target), weight=weight, **arguments)
    torch.testing.assert_close(both, (torch.stack(each) * weight).sum() / weight.sum())


def test_sampled_softmax_does_not_contrast_with_other_positives():
    count = np.array([0, 0, 5, 5, 5])
    rng = np.random.default_rng(0)
    candidates = sampled_softmax(np.array([2, 3]), Pool.of(count), 1, rng)
    drawn = candidates.log_weight > -np.inf
    assert drawn.sum() == 1
    assert candidates.log_weight[drawn] == pytest.approx(np.log(3))


def test_untrained_items_are_never_proposed(world):
    _, _, count, target = world
    count = count.copy()
    count[-5:] = 0
    target = np.where(target >= len(count) - 5, FIRST_ROW, target)
    for propose in LOSSES.values():
        assert (count[propose(target, Pool.of(count), 500, np.random.default_rng(0)).row] > 0).all()


def test_other_positives_by_hand():
    offsets, positives = np.array([0, 0, 0, 3, 4]), np.array([5, 6, 8, 5])
    example, column = other_positives(np.array([2, 3, 2]), np.array([5, 5, 6]), np.array([4, 5, 6, 7]), offsets, positives)
    assert sorted(zip(example.tolist(), column.tolist(), strict=True)) == [(0, 2), (2, 1)]


def test_an_explicit_negative_adds_its_weight_to_the_sum_of_its_example_alone() -> None:
    """By hand: two examples, three candidates with scores 1, 2, 0 and 0, 2, 1; the first dislikes candidate 2 with weight 3."""
    users, items = torch.tensor([[1.0, 2.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.5]])
    log_weight = torch.log(torch.tensor([0.5, 2.0, 0.0]))  # candidate 2 was not drawn
    negatives = Negatives.of(np.array([0]), np.array([2]), np.log(np.array([3.0])), 2)
    leaves = [leaf.double().requires_grad_() for leaf in (users, items, torch.tensor(1.0))]
    loss = softmax_loss(
        leaves[0], leaves[1], target=torch.tensor([0, 1]), log_weight=log_weight.double(), masked=None, temperature=leaves[2],
        negatives=negatives,
    )  # fmt: skip
    scores = leaves[0] @ leaves[1].T / leaves[2]
    first = torch.log(scores[0, 0].exp() + 2 * scores[0, 1].exp() + 3 * scores[0, 2].exp()) - scores[0, 0]
    second = torch.log(scores[1, 1].exp() + 0.5 * scores[1, 0].exp()) - scores[1, 1]
    torch.testing.assert_close(loss, (first + second) / 2)
    assert float(loss.detach()) == pytest.approx((np.log(np.e + 2 * np.e**2 + 3 * np.e) - 1 + np.log(np.e**2 + 0.5) - 2) / 2)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad((first + second) / 2, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("block", [1, 3 * N, 2**22])
def test_explicit_negatives_and_masks_in_blocks_are_those_of_one_matrix(world, block: int) -> None:
    users, items, count, target = world
    candidates = infonce(target, Pool.of(count), 30, np.random.default_rng(4))
    rng, size = np.random.default_rng(5), len(candidates.row)
    pairs = np.unique(rng.integers(0, Q * size, 60))
    example, column = pairs // size, pairs % size
    own = column == candidates.target[example]
    added = rng.random(len(pairs))
    masked = (example[::3], column[::3])
    log_weight = candidates.log_weight.astype(np.float64)
    with np.errstate(divide="ignore"):
        raised = np.log(np.exp(log_weight[column]) + added)
    loss = softmax_loss(
        users, items[candidates.row], target=torch.from_numpy(candidates.target), log_weight=torch.from_numpy(log_weight),
        masked=Masked.of(*masked, Q), negatives=Negatives.of(example, column, raised, Q), temperature=TEMPERATURE, block=block,
    )  # fmt: skip
    weights = np.tile(np.exp(log_weight), (Q, 1))
    weights[example, column] += added
    weights[masked] = 0
    weights[np.arange(Q), candidates.target] = 1
    scores = users @ items[candidates.row].T / TEMPERATURE
    sums = torch.log((scores.exp() * torch.from_numpy(weights)).sum(dim=1))
    assert own.any(), "a target among the negatives must have no effect"
    torch.testing.assert_close(loss, (sums - scores[torch.arange(Q), torch.from_numpy(candidates.target)]).mean())

"""Test the softmax loss: equal to its formula in blocks of any size, in bounded memory and in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from twotower.utils.losses import Masked, softmax_loss

N, D, Q = 40, 8, 16
TEMPERATURE = torch.tensor(0.3, dtype=torch.float64)


def plain_loss(users, items, temperature, *, target, log_weight, masked, weight) -> torch.Tensor:
    """Return the loss by its formula, with all logits at once."""
    scores = users @ items.T / temperature
    positive = scores.gather(1, target[:, None])
    pairs = (masked.example, masked.column)
    logits = (scores + log_weight).index_put(pairs, scores.new_tensor(float("-inf"))).scatter(1, target[:, None], positive)
    return ((torch.logsumexp(logits, dim=1) - positive[:, 0]) * weight).sum() / weight.sum()


def problem(size: int, width: int, seed: int = 0) -> tuple[list[torch.Tensor], dict]:
    """Return random users, items, temperature and other inputs: masks, zero weights, candidates left out."""
    rng = np.random.default_rng(seed)
    users, items = (torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(n, D))), dim=1) for n in (size, width))
    target = rng.integers(0, width, size)
    log_weight = rng.normal(size=width)
    log_weight[rng.random(width) < 0.2] = -np.inf
    example, column = np.nonzero((rng.random((size, width)) < 0.1) & (np.arange(width) != target[:, None]))
    weight = rng.integers(0, 4, size).astype(np.float64)
    weight[0] = 1.5
    rest = {"target": target, "log_weight": log_weight, "weight": weight}
    arguments = {name: torch.from_numpy(value) for name, value in rest.items()}
    leaves = [users, items, torch.tensor(0.2, dtype=torch.float64)]
    return [leaf.requires_grad_() for leaf in leaves], arguments | {"masked": Masked.of(example, column, size)}


@pytest.mark.parametrize("block", [1, 3 * 23 + 1, 17 * 23, 10**9])
def test_value_and_gradients_are_those_of_the_formula_whatever_the_block(block):
    leaves, arguments = problem(17, 23)
    expected = plain_loss(*leaves, **arguments)
    users, items, temperature = leaves
    loss = softmax_loss(users, items, temperature=temperature, block=block, **arguments)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    wanted, found = (torch.autograd.grad(3 * value, leaves) for value in (expected, loss))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_parts_over_the_sum_of_all_weights_add_up():
    leaves, arguments = problem(12, 9)
    users, items, temperature = leaves
    example, column = arguments["masked"].example.numpy(), arguments["masked"].column.numpy()
    whole = softmax_loss(users, items, temperature=temperature, **arguments)
    parts = []
    for a, b in ((0, 5), (5, 12)):
        inside = (example >= a) & (example < b)
        own = {name: arguments[name][a:b] for name in ("target", "weight")}
        own |= {"masked": Masked.of(example[inside] - a, column[inside], b - a), "log_weight": arguments["log_weight"]}
        parts.append(softmax_loss(users[a:b], items, temperature=temperature, weight_sum=arguments["weight"].sum(), **own))
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_extreme_logits_stay_exact_in_float32():
    """At the lowest temperature the share of a positive may round to zero: another candidate is e^200 times as likely."""
    users = torch.tensor([[1.0, 0.0]], requires_grad=True)
    items = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    cold = {"temperature": torch.tensor(0.01), "masked": None, "log_weight": torch.zeros(2)}
    loss = softmax_loss(users, items, target=torch.tensor([0]), **cold)
    loss.backward()
    assert loss.item() == pytest.approx(200)
    torch.testing.assert_close(users.grad, torch.tensor([[200.0, 0.0]]))


class Tensors(TorchDispatchMode):
    """Records the largest tensor that an operation returns, and the number of matrix products."""

    largest = products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = out if isinstance(out, tuple | list) else (out,)
        self.largest = max(self.largest, *(each.numel() for each in found if isinstance(each, torch.Tensor)), 0)
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return out


@pytest.mark.parametrize(("size", "width"), [(50, 40), (400, 40), (50, 400)])
def test_nothing_is_larger_than_a_block_or_a_gradient(size, width):
    leaves, arguments = problem(size, width)
    with Tensors() as seen:
        softmax_loss(*leaves[:2], temperature=leaves[2], block=800, **arguments).backward()
    assert seen.largest <= max(800, size * D, width * D)


class Blocks(TorchDispatchMode):
    """Records where tensors of a given size are in memory."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.places = numel, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.numel:
            self.places.add(out.data_ptr())
        return out


def test_all_blocks_share_one_buffer():
    """Check that logits are converted to shares and gradients in place, block by block."""
    leaves, arguments = problem(30, 37)
    with Blocks(5 * 37) as seen:
        softmax_loss(*leaves[:2], temperature=leaves[2], block=5 * 37, **arguments).backward()
    assert len(seen.places) == 1


def test_the_gradient_is_made_once_and_only_when_wanted():
    leaves, arguments = problem(10, 20)
    with Tensors() as wanted:
        softmax_loss(*leaves[:2], temperature=leaves[2], **arguments).backward()
    with Tensors() as unwanted, torch.no_grad():
        softmax_loss(*leaves[:2], temperature=leaves[2], **arguments)
    assert (wanted.products, unwanted.products) == (3, 1)


def test_the_gradient_is_a_constant():
    leaves, arguments = problem(4, 5)
    loss = softmax_loss(*leaves[:2], temperature=leaves[2], **arguments)
    (first,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    assert not first.requires_grad


def test_a_second_derivative_is_refused_and_not_silently_zero():
    leaves, arguments = problem(4, 5)
    scale = leaves[0].new_tensor(2.0).requires_grad_()
    loss = softmax_loss(*leaves[:2], temperature=leaves[2], **arguments)
    (first,) = torch.autograd.grad(loss * scale, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_it_is_computed_in_float32_under_autocast():
    leaves, arguments = problem(6, 7)
    leaves, arguments = [leaf.detach().float() for leaf in leaves], {**arguments, "log_weight": arguments["log_weight"].float()}
    exact = softmax_loss(*leaves[:2], temperature=leaves[2], **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(softmax_loss(*leaves[:2], temperature=leaves[2], **arguments), exact)

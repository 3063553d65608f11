"""Workers of which some have no loss: right as in one process, or an error that says who, where and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from disagreeing_workers import (
    RIGHT,
    VERDICTS,
    WRONG,
    Case,
    Net,
    Part,
    Sparse,
    adam,
    at,
    found_by_all,
    leaf,
    reference,
)

from raytrainer.errors import ConfigurationError


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    """What each worker found, by case."""
    return found_by_all(tmp_path_factory.mktemp("disagreeing"))


@pytest.mark.parametrize("name", RIGHT, ids=", ".join)
def test_as_in_one_process(found, name):
    case = RIGHT[name]
    expected = reference(case)
    assert len(found[name]) == case.world
    for weights in found[name]:
        assert not isinstance(weights, str), weights
        for key, value in expected.items():
            single = value.dtype == torch.float32 or name[0] == "mixed"
            tolerance = {"rtol": 1e-4, "atol": 1e-6} if single else {"rtol": 1e-9, "atol": 1e-11}
            torch.testing.assert_close(weights[key], value, **tolerance, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", WRONG)
def test_all_are_told_whose_it_was(found, name):
    """At least one worker raises, within two seconds of which the driver ends the others."""
    words = WRONG[name][1]
    told = [f for f in found[name] if isinstance(f, str)]
    assert told
    for error in told:
        assert all(word in error for word in words), error


def test_cases_differ():
    """Lest what is compared with were the same whatever is left out."""
    references = [reference(Case(verdict))["part.layer.weight"] for verdict in VERDICTS.values()]
    for i, one in enumerate(references):
        for other in references[:i]:
            assert not torch.equal(one, other)


@pytest.mark.parametrize("part", [Part, Sparse])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_one_process(part, accumulate, local_trainer):
    """The loops' own reference, where nobody else is."""
    optimizer = adam if part is Part else (lambda parameters: torch.optim.SGD(parameters, 0.3))
    for verdict in (VERDICTS["none by all"], VERDICTS["leaf by all"]):
        case = Case(verdict, part=part, optimizer=optimizer, accumulate=accumulate, world=1)
        module = Net(case)
        loader = torch.utils.data.DataLoader(range(4))
        local_trainer(max_epochs=2, accumulate_grad_batches=accumulate).fit(module, loader)
        for name, value in reference(case).items():
            torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("instead", "words"),
    [
        (lambda loss: loss.detach(), "without a graph in batch 1"),
        (lambda loss: torch.zeros(()), "without a graph in batch 1"),
        (lambda loss: loss.repeat(3), "of shape (3,) in batch 1"),
        (lambda loss: loss.to(torch.complex64), "complex in batch 1"),
    ],
)
def test_a_loss_that_has_no_backward_pass(instead, words, local_trainer):
    module = Net(Case(at(1, 0, instead)))
    with pytest.raises(ConfigurationError) as told:
        local_trainer(max_epochs=1).fit(module, torch.utils.data.DataLoader(range(4)))
    assert words in str(told.value) and "rank" not in str(told.value)


def test_an_own_backward_may_take_what_it_likes(local_trainer):
    class Sums(Net):
        def backward(self, loss):
            loss.sum().backward()

    module = Sums(Case(lambda batch_idx, rank, loss: loss.repeat(2)))
    start = module.part.layer.weight.clone()
    local_trainer(max_epochs=1).fit(module, torch.utils.data.DataLoader(range(4)))
    assert not torch.equal(start, module.part.layer.weight)
    assert leaf().requires_grad

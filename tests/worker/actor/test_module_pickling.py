"""Modules that torch does not pickle, on their way to a worker and home."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import Mortal
from tiny import Tiny, data
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.private import torch_private
from raytrainer.worker.actor.module_pickling import Pickled, dumps


class Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).mT

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu()


def own(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def twice(layer: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(parametrizations.spectral_norm(layer, "bias"), "weight")


def scripted(layer: nn.Module) -> nn.Module:
    return torch.jit.script(layer)


def traced(layer: nn.Module) -> nn.Module:
    return torch.jit.trace(layer, torch.zeros(1, 4))


KINDS = [
    parametrizations.spectral_norm,
    parametrizations.weight_norm,
    parametrizations.orthogonal,
    own,
    scripted,
    traced,
]


def make(kind: Any) -> nn.Module:
    return nn.Sequential(kind(nn.Linear(4, 4)), nn.Linear(4, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_copies_are_equal_and_train(kind: Any) -> None:
    module = make(kind).train()
    x = torch.randn(3, 4)
    copy = module
    for _ in range(2):  # a copy travels as well
        copy = Pickled(dumps(copy)).get()
    module.eval(), copy.eval()
    assert torch.equal(module(x), copy(x))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), copy.parameters(), strict=True))
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in copy.named_parameters()]
    module.train(), copy.train()
    copy(x).sum().backward()
    assert all(p.grad is not None for p in copy.parameters())
    copy.load_state_dict(module.state_dict())
    if kind not in (scripted, traced):
        assert parametrize.is_parametrized(copy[0], "weight")
        parametrize.remove_parametrizations(copy[0], "weight")
        assert isinstance(copy[0].weight, nn.Parameter) and type(copy[0]) is nn.Linear


class Of(Tiny):
    """A Tiny with such a layer, from `__init__` or from `configure_model`; it counts in several places."""

    def __init__(self, kind: Any, late: bool) -> None:
        super().__init__()
        self.kind, self.inner = kind, None
        self.layer = nn.Linear(4, 2)
        self.counter = Counter()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long), persistent=False)
        self.register_buffer("table", None, persistent=False)
        if not late:
            self.build()

    def build(self) -> None:
        self.inner = self.kind(nn.Linear(4, 4))

    def configure_model(self) -> None:
        if self.inner is None:
            self.build()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.inner(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += 1
        self.counter.steps += 1
        self.table = torch.ones(2)
        return super().training_step(batch, batch_idx)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0


@pytest.mark.parametrize("late", [False, True], ids=["init", "configure_model"])
@pytest.mark.parametrize("kind", [parametrizations.spectral_norm, parametrizations.orthogonal, own, scripted])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_they_train_as_in_one_process(kind: Any, late: bool, monkeypatch: Any, local_trainer: Any) -> None:
    """Several times; and buffers that are not in the state dict, and counters of inner modules, come home."""

    def fit(times: int = 2) -> Of:
        torch.manual_seed(4)
        module = Of(kind, late)
        for _ in range(times):
            local_trainer(max_epochs=1, seed=1).fit(module, data())
        return module

    expected = fit()
    monkeypatch.setattr(GroupSupply, "take", lambda self, settings: Mortal())
    found = fit()
    assert all(
        torch.equal(a, b) for a, b in zip(expected.state_dict().values(), found.state_dict().values(), strict=True)
    )
    assert int(found.seen) == int(expected.seen) == 20
    assert found.counter.steps == expected.counter.steps == 20
    assert torch.equal(found.table, expected.table)


@pytest.mark.parametrize("name", ["_inject_new_class", "_inject_property"])
def test_without_torchs_private_functions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = own(nn.Linear(4, 4))
    monkeypatch.delattr(parametrize, name)
    assert torch_private.reduce_parametrized(layer) is None


def test_a_class_of_a_script_may_name_what_torch_puts_in_a_modules_place() -> None:
    """`torch.backends.cudnn` is an object that looks like a module, which cloudpickle refuses."""
    source = "def look(self): return torch.backends.cudnn.deterministic, torch.backends.mps.is_available()"
    names: dict[str, Any] = {"torch": torch, "__name__": "__main__"}
    exec(source, names)
    kind = type("OfAScript", (Tiny,), {"look": names["look"], "__module__": "__main__"})
    sent = Pickled(dumps(kind())).get()
    assert sent.look() == (torch.backends.cudnn.deterministic, torch.backends.mps.is_available())

"""`compile=...` and `float32_matmul_precision`: what is compiled, in how many graphs, what stays as it was."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from raytrainer.worker.compiling import compile_module, parts_to_compile

dynamo = pytest.importorskip("torch._dynamo")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


class Recorder:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward


class Inner(tiny.Tiny):
    """A step that calls an inner module and logs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.criterion = nn.MSELoss()
        self.blocks = nn.ModuleList([nn.Linear(2, 2)])

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.criterion(self.blocks[0](self.net(x)), y)
        self.log("loss", loss, prog_bar=True)
        self.log("x", x.mean())
        return loss


class NoForward(Inner):
    forward = nn.Module.forward

    def loss(self, batch):
        return self.criterion(self.net(batch[0]), batch[1])


def test_parts():
    module = NoForward()
    assert parts_to_compile(module) == [module.layer, module.net, module.blocks[0]]
    module = Inner()
    assert parts_to_compile(module)[0] is module
    module.net.compile(backend="eager")
    assert module.net not in parts_to_compile(module)


@pytest.mark.parametrize("kind", [tiny.Tiny, Inner, NoForward])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_same_training_without_graph_breaks(kind, backend, local_trainer):
    plain = kind()
    compiled = copy.deepcopy(plain)
    options = {"max_epochs": 2, "seed": 1}
    local_trainer(**options).fit(plain, tiny.data(), tiny.data(8))
    trainer = local_trainer(**options, compile={"backend": backend, "fullgraph": True})
    trainer.fit(compiled, tiny.data(), tiny.data(8))
    torch.testing.assert_close(tiny.weights(compiled), tiny.weights(plain))
    assert dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not dynamo.utils.counters["graph_break"]
    assert list(compiled.state_dict()) == list(plain.state_dict())
    # nothing of it is left
    assert all("_compiled_call_impl" not in part.__dict__ for part in compiled.modules())
    pickle.loads(pickle.dumps(compiled))


def test_one_graph_for_the_whole_forward(local_trainer):
    """Children inside a compiled forward are part of its graph, as when the module is compiled by hand."""

    class Deep(tiny.Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.second(self.first(x).relu()))

    by_hand, recorder = Recorder(), Recorder()
    x = torch.zeros(2, 4)
    torch.compile(Deep(), backend=by_hand)(x)
    dynamo.reset()
    module = Deep()
    local_trainer(max_epochs=1, compile={"backend": recorder}).fit(module, tiny.data())
    assert len(recorder.graphs) == len(by_hand.graphs) == 1
    assert len(recorder.graphs[0].graph.nodes) == len(by_hand.graphs[0].graph.nodes)


def test_each_of_many_layers_is_compiled(local_trainer):
    """More than dynamo's limit of graphs for one piece of code."""

    class Many(tiny.Tiny):
        forward = nn.Module.forward

        def __init__(self) -> None:
            super().__init__()
            self.layer = None
            self.layers = nn.ModuleList([nn.Linear(n + 4, n + 5) for n in range(12)])

        def loss(self, batch):
            x = batch[0]
            for layer in self.layers:
                x = layer(x)
            return x.square().mean()

    recorder = Recorder()
    local_trainer(max_epochs=1, compile={"backend": recorder}).fit(Many(), tiny.data())
    assert len(recorder.graphs) == 12


def test_pickles_and_copies_while_compiled():
    module = Inner()
    undo = compile_module(module, {"backend": "eager"})
    x = torch.ones(1, 4)
    module(x)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(other(x), module(x))
        assert "_orig_mod" not in " ".join(other.state_dict())
    undo()
    assert module._compiled_call_impl is None


class Net(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()


def test_user_compiled_module_is_left_alone(local_trainer):
    module, recorder = Inner(), Recorder()
    module.net = Net(4, 2)
    module.net.compile(backend=recorder)
    local_trainer(max_epochs=1, compile={"backend": "eager"}).fit(module, tiny.data())
    assert recorder.graphs
    assert module.net._compiled_call_impl is not None


def test_float32_matmul_precision(local_trainer):
    class Looks(tiny.Tiny):
        def training_step(self, batch, batch_idx):
            self.found = torch.get_float32_matmul_precision()
            return super().training_step(batch, batch_idx)

    before = torch.get_float32_matmul_precision()
    module = Looks()
    local_trainer(max_epochs=1, float32_matmul_precision="medium").fit(module, tiny.data())
    assert module.found == "medium"
    assert torch.get_float32_matmul_precision() == before

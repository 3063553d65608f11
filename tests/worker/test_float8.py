"""precision="float8", whose products a CPU emulates."""

from __future__ import annotations

import copy
import importlib.util
import logging
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import raytrainer as rt
from raytrainer.worker import float8

pytest.importorskip("torchao")
CPU = torch.device("cpu")


class Net(rt.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
        self.losses: list[float] = []
        self.kinds: list[str] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.mse_loss(self.layers(x).float(), y)
        self.losses.append(float(loss))
        self.kinds.append(type(self.layers[0]).__name__)
        return loss

    def predict_step(self, batch, batch_idx):
        return self.layers(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


def data(rows: int = 20) -> DataLoader:
    """Of which the last batch has another number of rows than GPUs multiply."""
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(rows, 16, generator=generator), torch.ones(rows, 3)), batch_size=8)


def by_hand(start: dict[str, torch.Tensor], low: bool) -> tuple[list[float], nn.Module]:
    """The same with torchao, as its documentation has it; or with bfloat16 alone."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    model = Net()
    model.load_state_dict(start)
    if low:
        convert_to_float8_training(
            model.layers, module_filter_fn=lambda _, name: name != "4", config=Float8LinearConfig(emulate=True)
        )
    optimizer, losses = model.configure_optimizers(), []
    for _ in range(3):
        for x, y in data():
            with torch.autocast("cpu", torch.bfloat16):
                # torchao looks at a GPU's autocast only
                loss = F.mse_loss(model.layers(x.bfloat16() if low else x).float(), y)
            losses.append(float(loss))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses, model


def test_equals_a_loop_by_hand_and_resembles_bf16(local_trainer, tmp_path, caplog):
    torch.manual_seed(2)
    net = Net()
    start = copy.deepcopy(net.state_dict())
    losses, model = by_hand(start, low=True)
    with caplog.at_level(logging.INFO):
        trainer = local_trainer(precision="float8", max_epochs=3)
        trainer.fit(net, data())
    assert "float8: 2 of 3 linear layers, without layers.4 (the last)" in caplog.text
    assert net.losses == losses and set(net.kinds) == {"Float8Linear"}
    for name, value in model.state_dict().items():
        assert net.state_dict()[name].equal(value)
    plain, _ = by_hand(start, low=False)
    assert losses != plain and max(abs(a - b) for a, b in zip(losses, plain, strict=True)) < 0.1 * losses[0]
    # what comes home is the user's own, and goes into other precisions and back
    assert type(net.layers[0]) is nn.Linear and vars(net.layers[0]).keys() == vars(nn.Linear(1, 1)).keys()
    assert list(net.state_dict()) == list(start) and {v.dtype for v in net.state_dict().values()} == {torch.float32}
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for precision in (32, "float8"):
        again = Net()
        local_trainer(precision=precision, max_epochs=4).fit(again, data(), ckpt_path=tmp_path / "a.ckpt")
        assert len(again.losses) == 3 and again.losses[0] < losses[0]
    assert torch.cat(trainer.predict(net, data())).shape == (20, 3)


@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 16), (0, 16), (16,), (32, 16)])
def test_rows_of_any_number_are_what_they_are_without_padding(shape):
    layers = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 2))
    float8.to_float8(layers, CPU)
    torchaos = type(layers[0]).__mro__[1]
    x = torch.randn(shape, requires_grad=True)
    ours = layers[0](x)
    assert ours.shape == (*shape[:-1], 32)
    if x.numel():
        theirs = torchaos.forward(layers[0], x)
        torch.testing.assert_close(ours, theirs)
        weight = layers[0].weight
        pairs = zip(*(torch.autograd.grad(y.sum(), [x, weight]) for y in (ours, theirs)), strict=True)
        for here, there in pairs:
            torch.testing.assert_close(here, there)


class Odd(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_which_layers_are_left_out():
    net = nn.ModuleDict({
        "plain": nn.Linear(16, 16), "odd": Odd(16, 16), "narrow": nn.Linear(16, 10), "table": nn.Embedding(32, 16),
        "tied": nn.Linear(16, 32, bias=False), "attention": nn.MultiheadAttention(16, 2), "last": nn.Linear(16, 16),
    })  # fmt: skip
    net["tied"].weight = net["table"].weight
    said, undo = float8.to_float8(net, CPU)
    assert said.startswith(
        "float8: 1 of 6 linear layers, without odd (a Odd), narrow (16 to 10), tied (its weight is another module's "
        "too), attention.out_proj (a NonDynamicallyQuantizableLinear) and 1 more; all else as with bf16-mixed"
    )
    assert type(net["plain"]).__name__ == "Float8Linear" and type(net["odd"]) is Odd
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(copied["plain"]) is nn.Linear and copied["plain"].weight.equal(net["plain"].weight)
    undo()
    assert type(net["plain"]) is nn.Linear


def test_a_models_output_is_left_out_wherever_it_is():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def get_output_embeddings(self):
            return self.head

    model = Model()
    assert "without head (the model's output), two (the last)" in float8.to_float8(model, CPU)[0]


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Sequential(nn.Linear(16, 10), nn.Linear(10, 2)), r"0 \(16 to 10\), 1 \(the last\)"),
        (nn.Sequential(nn.Conv1d(16, 16, 1)), "there is none"),
    ],
)
def test_a_module_without_fitting_layers_is_refused(module, why):
    with pytest.raises(rt.ConfigurationError, match=f"{why}.*multiples of 16"):
        float8.to_float8(module, CPU)


def test_a_gpu_without_float8_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(rt.ConfigurationError, match=r'float8" on a A100: .* 8\.9 .* 8\.0; use precision="bf16-mixed"'):
        float8.to_float8(nn.Sequential(nn.Linear(16, 16)), torch.device("cuda", 0))


def test_without_torchao_the_extra_is_named(monkeypatch):
    message = r"needs torchao.*not installed{}: pip install.*extra 'float8'.*bf16-mixed"
    monkeypatch.setattr("raytrainer.plan.settings.find_spec", lambda name: None)
    with pytest.raises(rt.ConfigurationError, match=message.format("")):
        rt.Trainer(precision="float8", strategy="local")
    rt.Trainer(precision="float8", strategy="ddp", num_processes=2)  # whose workers are asked, when there are any
    assert importlib.util.find_spec("torchao") is not None
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    float8._layer_kind.cache_clear()
    with pytest.raises(rt.ConfigurationError, match=message.format(" in the environment of the workers")):
        float8.to_float8(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), CPU)


def test_split_layers_are_refused():
    with pytest.raises(rt.ConfigurationError, match=r'ModelParallel.*strategy="fsdp"'):
        rt.Trainer(precision="float8", strategy=rt.ModelParallel(tensor=2), num_processes=2)


def test_compiled(local_trainer):
    eager, compiled = Net(), Net()
    compiled.load_state_dict(eager.state_dict())
    local_trainer(precision="float8", max_epochs=2).fit(eager, data())
    local_trainer(precision="float8", max_epochs=2, compile={"backend": "aot_eager"}).fit(compiled, data())
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-2)
    assert type(compiled.layers[0]) is nn.Linear

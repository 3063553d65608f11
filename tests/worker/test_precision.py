from __future__ import annotations

import pytest
import torch

import raytrainer
from raytrainer.worker.precision import Precision

CPU = torch.device("cpu")


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.BatchNorm1d(2)
        self.register_buffer("table", torch.arange(3))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool))


TRUE = [("64-true", torch.float64), ("bf16-true", torch.bfloat16), ("16-true", torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), TRUE)
def test_true_casts_parameters_and_floating_buffers(name, dtype):
    net = Net()
    Precision(name, CPU).convert_module(net)
    found = {key: tensor.dtype for key, tensor in net.state_dict().items()}
    whole = {"table": torch.int64, "mask": torch.bool, "layer.num_batches_tracked": torch.int64}
    assert found == {key: whole.get(key, dtype) for key in found}


@pytest.mark.parametrize(("name", "dtype"), TRUE)
def test_true_casts_inputs(name, dtype):
    convert = Precision(name, CPU).convert_input
    assert convert is not None
    batch = convert({"x": torch.zeros(2), "y": torch.zeros(2, dtype=torch.long), "more": [torch.zeros(1), "text"]})
    assert (batch["x"].dtype, batch["y"].dtype, batch["more"][0].dtype) == (dtype, torch.long, dtype)
    assert batch["more"][1] == "text"


@pytest.mark.parametrize("name", ["32-true", "bf16-mixed"])
def test_others_leave_module_and_inputs_alone(name):
    net, precision = Net(), Precision(name, CPU)
    before = {key: tensor.dtype for key, tensor in net.state_dict().items()}
    precision.convert_module(net)
    assert {key: tensor.dtype for key, tensor in net.state_dict().items()} == before
    assert precision.convert_input is None


@pytest.mark.parametrize(
    ("name", "product", "made", "plain"),
    [
        ("32-true", torch.float32, torch.float32, True),
        ("bf16-mixed", torch.bfloat16, torch.float32, False),
        ("64-true", torch.float32, torch.float64, False),
    ],
)
def test_context(name, product, made, plain):
    precision = Precision(name, CPU)
    a = torch.ones(2, 2)
    with precision.context():
        assert (a @ a).dtype == product
        assert torch.zeros(1).dtype == made
    assert torch.zeros(1).dtype == torch.float32 and (a @ a).dtype == torch.float32
    assert precision.plain is plain


def test_context_is_left_after_an_error():
    with pytest.raises(ZeroDivisionError), Precision("64-true", CPU).context():
        _ = 1 / 0
    assert torch.get_default_dtype() == torch.float32


def test_only_mixed_fp16_scales():
    assert Precision("16-mixed", CPU).scaler is not None
    assert all(Precision(name, CPU).scaler is None for name in ("32-true", "64-true", "16-true", "bf16-mixed"))


def test_no_scaler_steps_plainly():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], 1.0)
    precision = Precision("32-true", CPU)
    loss = precision.scale(parameter.sum())
    loss.backward()
    precision.unscale(optimizer)
    precision.step(optimizer)
    assert parameter.item() == 0.0
    assert precision.state_dict() == {}


class Recomputes(raytrainer.Module):
    """Makes tensors of the default type in what is computed again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.layer, self.made = torch.nn.Linear(2, 1), []

    def part(self, x):
        self.made.append((torch.ones(1) / torch.tensor(3)).dtype)
        return self.layer(x) * torch.ones(1)

    def training_step(self, batch, batch_idx):
        return torch.utils.checkpoint.checkpoint(self.part, batch, use_reentrant=False).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(("name", "dtype"), [*TRUE, ("32-true", torch.float32)])
def test_what_is_computed_again_has_the_types_of_before(name, dtype, local_trainer):
    module = Recomputes()
    local_trainer(precision=name, max_epochs=1).fit(module, torch.utils.data.DataLoader(torch.randn(2, 2)))
    assert module.made == [dtype] * 4 and torch.get_default_dtype() == torch.float32

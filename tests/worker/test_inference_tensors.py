"""What a validation makes and training then uses."""

from __future__ import annotations

import pytest
import torch
from tiny import Tiny, data

from raytrainer import ConfigurationError


class Caches(Tiny):
    """Makes a table on its first use, which is the sanity check's."""

    def __init__(self, keep):
        super().__init__()
        self.keep, self.inner = keep, torch.nn.Identity()
        self.register_buffer("table", None, persistent=False)

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def training_step(self, batch, batch_idx):
        scale = self.keep(self)
        return (self.layer.weight * scale).sum()


def plain(module):
    if not hasattr(module, "scale"):
        module.scale = torch.linspace(0.5, 1, 4)
    return module.scale


def nested(module):
    if not hasattr(module.inner, "cache"):
        module.inner.cache = {"by length": [torch.linspace(0.5, 1, 4)]}
    return module.inner.cache["by length"][0]


def buffer(module):
    if module.table is None:
        module.table = torch.linspace(0.5, 1, 4)
    return module.table


def in_place(module):
    found = plain(module)
    found += 1.0
    return found


@pytest.mark.parametrize(
    ("keep", "name"), [(plain, "scale"), (nested, "inner.cache"), (buffer, "table"), (in_place, "scale")]
)
def test_it_is_named_with_what_to_do(keep, name, local_trainer):
    with pytest.raises(ConfigurationError) as told:
        local_trainer(max_epochs=1).fit(Caches(keep), data(4), data(4))
    for words in (f"uses self.{name} for training", "inference_mode=False", "__init__"):
        assert words in str(told.value)
    assert isinstance(told.value.__cause__, RuntimeError)
    local_trainer(max_epochs=1, inference_mode=False).fit(Caches(keep), data(4), data(4))


def test_other_errors_stay_what_they_are(local_trainer):
    def fails(module):
        raise RuntimeError("of the user's own")

    with pytest.raises(RuntimeError) as told:
        local_trainer(max_epochs=1).fit(Caches(fails), data(4))
    assert str(told.value) == "of the user's own"

from __future__ import annotations

import logging

import pytest
from tiny import Tiny, data

from raytrainer import Callback, ConfigurationError, WorkerCallback


@pytest.mark.parametrize("name", ["training_epoch_end", "validation_epoch_end", "test_epoch_end"])
@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_hooks_that_had_outputs(name, verb, local_trainer):
    module = type("Old", (Tiny,), {name: lambda self, outputs: None})()
    with pytest.raises(ConfigurationError, match=rf"Old\.{name} is never called: it is on_\w+_epoch_end\(self\) now"):
        getattr(local_trainer(max_epochs=1), verb)(module, data(4))


@pytest.mark.parametrize("base", [Tiny, Callback, WorkerCallback])
def test_hooks_with_other_names(base, local_trainer, caplog):
    owner = type("Old", (base,), {"on_epoch_end": lambda self, *args: pytest.fail("called")})()
    module, callbacks = (owner, []) if base is Tiny else (Tiny(), [owner])
    with caplog.at_level(logging.WARNING, "raytrainer"):
        local_trainer(max_epochs=1, callbacks=callbacks).fit(module, data(4))
    assert "Old.on_epoch_end is not called by the Trainer; there is on_train_epoch_end" in caplog.text

"""Modules that are made real in their workers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sharded_models import WIDTH, Net, loader, same_bits, weights
from torch import nn

import raytrainer as rt
from raytrainer.checkpointing.checkpoint_format import read_checkpoint
from raytrainer.strategies.materialising import Materialiser


class Resets(Net):
    """Sets the buffer that it has itself."""

    def reset_parameters(self):
        self.scale.fill_(1.0)


def on_meta():
    return rt.on_meta(Resets)


def trained(forked, folder, workers, epochs=1, **options):
    module = on_meta()
    saver = rt.ModelCheckpoint(folder, save_last=True)
    trainer = forked(
        num_processes=workers, seed=5, max_epochs=epochs, enable_checkpointing=True, callbacks=[saver], **options
    )
    trainer.fit(module, loader(32, 8 // workers, torch.float32))
    assert all(parameter.is_meta for parameter in module.parameters())  # as it was
    return trainer, Net.load_from_checkpoint(folder / "last.ckpt")


def test_weights_are_the_same_on_any_number_of_workers(forked, tmp_path):
    class Still(Resets):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    found = []
    for workers, seed in ((1, 5), (2, 5), (4, 5), (2, 6)):
        module = rt.on_meta(Still)
        folder = tmp_path / f"{workers}-{seed}"
        saver = rt.ModelCheckpoint(folder, save_last=True)
        trainer = forked(num_processes=workers, seed=seed, max_epochs=1, enable_checkpointing=True, callbacks=[saver])
        trainer.fit(module, loader(32, 4, torch.float32))
        found.append(Still.load_from_checkpoint(folder / "last.ckpt"))
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])
    assert not torch.equal(found[0].head.weight, found[3].head.weight)
    values = weights(found[0])
    assert all(value.isfinite().all() for value in values.values())
    # torch's own initialisation, other in each block
    bound = WIDTH**-0.5
    assert values["blocks.0.up.weight"].abs().max() <= bound and values["blocks.0.up.weight"].std() > bound / 4
    assert not torch.equal(values["blocks.0.up.weight"], values["blocks.1.up.weight"])
    assert torch.equal(values["blocks.0.norm.weight"], torch.ones(WIDTH))


def test_trains_and_goes_on(forked, tmp_path):
    _, straight = trained(forked, tmp_path / "straight", 2, epochs=2)
    first, _ = trained(forked, tmp_path / "first", 2)
    first.save_checkpoint(tmp_path / "end.ckpt")
    module = on_meta()
    saver = rt.ModelCheckpoint(tmp_path / "second", save_last=True)
    again = forked(seed=5, max_epochs=2, enable_checkpointing=True, callbacks=[saver])
    again.fit(module, loader(32, 4, torch.float32), ckpt_path=tmp_path / "end.ckpt")
    assert same_bits(straight, Net.load_from_checkpoint(tmp_path / "second" / "last.ckpt"))
    with pytest.raises(rt.CheckpointError, match="on the meta device"):
        again.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)


class Tunable(Resets):
    def __init__(self):
        super().__init__()
        self.lr, self.batch_size = 0.1, 1

    def train_dataloader(self):
        return loader(32, self.batch_size, torch.float32)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr)


@pytest.mark.sample(1)
@pytest.mark.parametrize("make", [Tunable, lambda: rt.on_meta(Tunable)], ids=["real", "on meta"])
def test_tuning(make, forked):
    module = make()
    before = {name: value.clone() for name, value in weights(module).items()}
    trainer = forked(max_epochs=2)
    assert trainer.scale_batch_size(module, max_trials=2) == module.batch_size == 4
    assert trainer.lr_find(module, num_training=20).suggestion() > 0.0
    assert all(value.is_meta or torch.equal(value, before[name]) for name, value in weights(module).items())


def test_the_best_checkpoint_and_weights_alone(forked, tmp_path):
    module = on_meta()
    saver = rt.ModelCheckpoint(tmp_path, monitor="val", save_top_k=2, save_weights_only=True)
    trainer = forked(max_epochs=4, enable_checkpointing=True, callbacks=[saver])
    trainer.fit(module, loader(32, 4, torch.float32), loader(13, 2, torch.float32))
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    found = trainer.validate(module, loader(13, 2, torch.float32), ckpt_path="best")[0]["val"]
    assert found == pytest.approx(float(saver.best_model_score), rel=1e-5)
    whole = Resets.load_from_checkpoint(saver.best_model_path)
    predicted = trainer.predict(module, loader(8, 4, torch.float32), ckpt_path="best")
    expected = [whole(x) for x, _ in loader(8, 4, torch.float32)]
    torch.testing.assert_close(predicted, expected)


class Table(nn.Module):
    def __init__(self, integers):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4) if integers else torch.arange(4.0))


@pytest.mark.parametrize("integers", [True, False])
def test_what_stays_unset_is_named(integers, forked):
    class HasTable(Resets):
        def __init__(self):
            super().__init__()
            self.extra = Table(integers)

    with pytest.raises(rt.ConfigurationError, match=r"'extra\.table' \(of a Table\) unset.*reset_parameters\(\)"):
        forked(max_epochs=1).fit(rt.on_meta(HasTable), loader(32, 4, torch.float32))


class Normed(Resets):
    """Two layers are made anew in `configure_model`, or stay; and have a parametrisation."""

    def __init__(self, anew):
        super().__init__()
        self.anew = anew

    def configure_model(self):
        for block in self.blocks:
            layers = [nn.Linear(*part.weight.shape[::-1]) if self.anew else part for part in (block.up, block.down)]
            block.up = nn.utils.parametrizations.weight_norm(layers[0])
            block.down = nn.utils.parametrizations.spectral_norm(layers[1])


def test_parametrised_layers_are_made_in_configure_model(forked, tmp_path):
    found = []
    for workers in (1, 2):
        saver = rt.ModelCheckpoint(tmp_path / str(workers), save_last=True, save_weights_only=True)
        options = {"max_epochs": 1, "precision": 64, "enable_checkpointing": True, "callbacks": [saver]}
        trainer = forked(num_processes=workers, seed=5, **options)
        trainer.fit(rt.on_meta(lambda: Normed(True)), loader(32, 8 // workers))
        found.append(read_checkpoint(tmp_path / str(workers) / "last.ckpt")["state_dict"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
    with pytest.raises(rt.ConfigurationError, match=r"original0' .* parametrisation .*anew in configure_model\(\)"):
        forked(max_epochs=1).fit(rt.on_meta(lambda: Normed(False)), loader(32, 4))


class Listed(nn.Module):
    """Has parameters in lists alone."""

    def __init__(self, resets):
        super().__init__()
        self.few = nn.ParameterList(nn.Parameter(torch.zeros(2)) for _ in range(2))
        self.named = nn.ParameterDict({"inner": nn.ParameterDict({"one": nn.Parameter(torch.zeros(2))})})
        if resets:
            self.reset_parameters = lambda: [nn.init.ones_(parameter) for parameter in self.parameters()]


def test_parameters_in_lists_are_set_by_the_module_that_has_them():
    module = rt.on_meta(lambda: nn.Sequential(Listed(True)))
    Materialiser(module, torch.device("cpu"), 1).make(module, {})
    assert [parameter.tolist() for parameter in module.parameters()] == 3 * [[1.0, 1.0]]
    module = rt.on_meta(lambda: nn.Sequential(Listed(False)))
    with pytest.raises(rt.ConfigurationError, match=r"'0\.few\.0' \(of a ParameterList\).* or in a ParameterList"):
        Materialiser(module, torch.device("cpu"), 1).make(module, {})


def test_other_strategies_refuse_it(forked):
    with pytest.raises(rt.ConfigurationError, match=r'on the meta device .* strategy="fsdp"'):
        forked(strategy="local", max_epochs=1).fit(on_meta(), loader(32, 4, torch.float32))


class Scaled(nn.Embedding):
    """As of transformers: it has a buffer, which torch's `reset_parameters` knows nothing of."""

    def __init__(self):
        super().__init__(6, 4)
        self.register_buffer("scale", torch.tensor(2.0))


class Attention(nn.Module):
    """Has no parameter itself; the model's initialisation has a rule for it all the same."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(4, 4), nn.Linear(4, 4)


class LikeTransformers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layers = Scaled(), nn.ModuleList(Attention() for _ in range(2))
        self.bare = nn.Parameter(torch.zeros(3))

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            self._fill(module.weight, 3.0)
        if isinstance(module, Scaled):
            self._fill(module.weight, 4.0)
            self._fill(module.scale, 2.0)
        if isinstance(module, Attention):
            self._fill(module.out.weight, 5.0)
        if isinstance(module, LikeTransformers):
            module.bare.data.fill_(6.0)  # as older versions do
            for name, parameter in module.named_parameters():
                if "first" in name:
                    self._fill(parameter, 7.0)

    def _fill(self, tensor, value):
        if not getattr(tensor, "_is_hf_initialized", False):
            tensor.fill_(value)


def test_a_model_of_transformers_begins_as_it_does_there():
    module = nn.Module()
    module.model = rt.on_meta(LikeTransformers)
    module.model.layers[1].out = nn.Linear(4, 4)  # which is real, and stays what it is
    kept = module.model.layers[1].out.weight.clone()
    maker = Materialiser(module, torch.device("cpu"), 1)
    blocks = {f"model.layers.{index}": layer for index, layer in enumerate(module.model.layers)}
    for block in blocks.values():
        maker.make(block, {})
    maker.make(module, blocks)
    found = {name: value for name, value in weights(module).items() if not name.endswith("bias")}
    assert torch.equal(found.pop("model.layers.1.out.weight"), kept)
    assert {name: value.unique().tolist() for name, value in found.items()} == {
        "model.embedding.weight": [4.0], "model.embedding.scale": [2.0], "model.bare": [6.0],
        "model.layers.0.first.weight": [3.0], "model.layers.0.out.weight": [5.0],
        "model.layers.1.first.weight": [3.0],
    }  # fmt: skip
    assert not any(hasattr(tensor, "_is_hf_initialized") for tensor in module.parameters())


def test_a_method_of_that_name_which_takes_no_module_is_not_called():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self._init_weights()

        def _init_weights(self):
            nn.init.zeros_(self.layer.weight)

    with torch.device("meta"):
        module = Own()
    Materialiser(module, torch.device("cpu"), 0).make(module, {})
    assert module.layer.weight.std() > 0.1


class LikeLora(nn.Module):
    """A linear layer of PEFT's with an adapter, and its way of giving that its first values."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(4, 4)
        self.lora_A = nn.ModuleDict({"first": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"first": nn.Linear(2, 4, bias=False)})
        self.lora_embedding_A = nn.ParameterDict()

    def reset_lora_parameters(self, name, how):
        assert how in (True, "gaussian")
        nn.init.constant_(self.lora_A[name].weight, 0.5)
        nn.init.zeros_(self.lora_B[name].weight)


def like_peft(**config):
    root = nn.Sequential(LikeLora(), LikeLora())
    common = {"peft_type": "LORA", "init_lora_weights": True, "modules_to_save": None}
    root.peft_config = {"first": SimpleNamespace(**common | config)}
    return root


@pytest.mark.parametrize("how", [True, "gaussian"])
def test_adapters_begin_as_peft_has_them(how):
    with torch.device("meta"):
        root = like_peft(init_lora_weights=how)
    make = Materialiser(root, torch.device("cpu"), 0).make
    make(root[1], {})  # a block
    make(root, {"1": root[1]})
    for layer in root:
        assert (layer.lora_A["first"].weight == 0.5).all() and (layer.lora_B["first"].weight == 0).all()
        assert layer.base_layer.weight.std() > 0.1


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"init_lora_weights": "pissa"}, "'first' begins with init_lora_weights='pissa'"),
        ({"modules_to_save": ["head"]}, r"'first' has modules_to_save=\['head'\]"),
        ({"peft_type": SimpleNamespace(value="PROMPT_TUNING")}, "'first' is of the type PROMPT_TUNING"),
    ],
    ids=str,
)
def test_other_adapters_are_refused(config, what):
    with torch.device("meta"):
        root = like_peft(**config)
    with pytest.raises(rt.ConfigurationError, match=f"on_meta: PEFT's adapter {what}.*without on_meta"):
        Materialiser(root, torch.device("cpu"), 0).make(root, {})

"""Hyperparameters in checkpoints: what was saved comes back with its type, or loading says what is missing."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import functools
import logging
import math
import pathlib
import sys
import types
import uuid
from dataclasses import InitVar, dataclass, field

import numpy
import own_config
import pytest
import torch
from forge import as_first_version, forge
from own_config import Config, Kind, Old, Outer, Pair, Parts, Size, Text
from torch import nn

import raytrainer
from raytrainer import CheckpointError, ConfigurationError, DataModule, Module
from raytrainer.checkpointing.checkpoint_format import read_checkpoint, write_checkpoint
from raytrainer.driver.reporting.logged_hyperparameters import logged_hyperparameters
from raytrainer.hparams import AttributeDict
from raytrainer.init_calls import construct


class Values(Module):
    def __init__(self, **values):
        super().__init__()
        self.save_hyperparameters()


class One(Module):
    def __init__(self, value="default"):
        super().__init__()
        self.save_hyperparameters()
        self.value = value


def saved(module, path):
    """A checkpoint of a module, or of a DataModule, without a run."""
    prefix = "datamodule_" if isinstance(module, DataModule) else ""
    state = {} if prefix else module.state_dict()
    write_checkpoint(path, {"state_dict": state, **module.hyperparameters_to_save(prefix)})
    return path


def reloaded(module, tmp_path, **overrides):
    return type(module).load_from_checkpoint(saved(module, tmp_path / "x.ckpt"), **overrides)


PLAIN = [
    None, True, 3, 0.1, 1j, "s", b"b", [1, ("a", None)], {"a": {1: [2]}}, {1, 2}, frozenset({3, 4}), (1, 2),
    {Kind.A}, {frozenset({1})}, {(1, Kind.B)}, frozenset({Pair(1, "r")}), set(), [{Size.LARGE}],
    {(1, 2): "tuple", Kind.A: 1, None: 2}, {"raytrainer type": "enum", "value": "x"},
    collections.OrderedDict(b=1, a=2), collections.Counter("aab"), AttributeDict(a=AttributeDict(b=1)),
    range(1, 9, 2), slice(1, None), argparse.Namespace(a=1, b=argparse.Namespace(c=[2])),
    types.SimpleNamespace(a=1), datetime.timedelta(1, 2, 3), datetime.date(2020, 1, 2), datetime.time(1, 2),
    datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.UTC), decimal.Decimal("0.10"), fractions.Fraction(1, 3),
    uuid.UUID(int=5), pathlib.Path("a/b"), pathlib.PurePosixPath("/x"), pathlib.PureWindowsPath("c:/x"),
    torch.float16, torch.device("cuda", 1), torch.Size([2, 3]), torch.channels_last, torch.strided,
    numpy.float32(0.1), numpy.float64(0.1), numpy.int64(3), numpy.bool_(True), numpy.dtype("int16"),
    numpy.datetime64("2020-01-02"), numpy.str_("x"),
    Kind.B, Size.LARGE, Text.X, Parts.HEAD, Parts.HEAD | Parts.BODY, Pair(1, "r"), Old((1, 2)),
    Config(pathlib.Path("p"), Kind.B, [1]), {"deep": [Config(pathlib.Path("p"))]},
    int, dict, len, math.tanh, nn.ReLU, torch.optim.AdamW, torch.optim.lr_scheduler.StepLR, nn.functional.gelu,
    nn.functional.relu, nn.functional.max_pool2d, torch.relu, torch.tanh, nn.init.kaiming_uniform_, numpy.tanh,
    numpy.float32, own_config.act, Config, Outer.Inner, Kind,
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)  # not what differs by process
def test_values_and_types_come_back(value, tmp_path):
    own_config.made.clear()
    back = reloaded(One(value), tmp_path).value
    assert type(back) is type(value) and back == value and repr(back) == repr(value)
    assert not own_config.made  # nothing of the class has been run


def test_arrays_tensors_and_calls_come_back(tmp_path):
    values = {
        "array": numpy.arange(6, dtype=numpy.int16).reshape(2, 3),
        "fields": numpy.array([(1, "a")], dtype=[("n", "i4"), ("s", "U1")]),
        "tensor": torch.arange(3, dtype=torch.bfloat16),
        "parameter": nn.Parameter(torch.ones(2)),
        "partial": functools.partial(nn.LeakyReLU, 0.3, inplace=True),
        "default": collections.defaultdict(list, a=[1]),
    }
    back = reloaded(Values(**values), tmp_path).hparams
    for name in ("array", "fields"):
        assert back[name].dtype == values[name].dtype and (back[name] == values[name]).all()
    assert torch.equal(back["tensor"], values["tensor"]) and back["tensor"].dtype == torch.bfloat16
    assert type(back["parameter"]) is nn.Parameter and torch.equal(back["parameter"], values["parameter"])
    made = back["partial"]()
    assert isinstance(made, nn.LeakyReLU) and (made.negative_slope, made.inplace) == (0.3, True)
    assert back["default"] == {"a": [1]} and back["default"].default_factory is list


def test_omegaconf_comes_back(tmp_path):
    OmegaConf = pytest.importorskip("omegaconf").OmegaConf
    config = OmegaConf.create({"lr": 0.1, "net": {"width": [1, 2], "twice": "${lr}"}})
    OmegaConf.set_struct(config, True)
    OmegaConf.set_readonly(config, True)
    back = reloaded(One(config), tmp_path).value
    assert type(back) is type(config) and back == {"lr": 0.1, "net": {"width": [1, 2], "twice": 0.1}}
    assert OmegaConf.is_struct(back) and OmegaConf.is_readonly(back)

    class Whole(Module):
        def __init__(self, cfg):
            super().__init__()
            self.save_hyperparameters(cfg)
            self.cfg = cfg

    whole = Whole(OmegaConf.create({"lr": 0.1, "net": {"width": 2}}))
    whole.hparams.lr = 0.5
    back = reloaded(whole, tmp_path).cfg
    assert type(back) is type(config) and back == {"lr": 0.5, "net": {"width": 2}}


def test_interpolations_in_a_file_are_not_resolved(tmp_path):
    OmegaConf = pytest.importorskip("omegaconf").OmegaConf
    packed = {"raytrainer type": "omegaconf", "value": ({"a": "${oc.env:HOME}"}, None, {"struct": 0, "readonly": 0})}
    path = saved(One(OmegaConf.create({"a": 1})), tmp_path / "x.ckpt")
    with pytest.raises(ConfigurationError, match=r"value: it has interpolations"):
        One.load_from_checkpoint(forged(path, packed))


class Cell:
    def get(self):
        return self


def scaled(factor):
    def decorate(function):
        @functools.wraps(function)
        def call(x):
            return factor * function(x)

        return call

    return decorate


@scaled(2)
def double(x):
    return x


tripled = scaled(3)(double.__wrapped__)  # which calls itself "double"


def local():
    class Hidden(enum.Enum):
        A = "a"

    return Hidden.A


class Loose(dict):
    pass


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: lambda x: x, "<lambda>"),
        (lambda: [1, {"deep": lambda x: x}], "<lambda>"),
        (lambda: nn.Linear(1, 1), r"module \(Linear; its weights are in the checkpoint\)"),
        (Cell, "Cell"),
        (local, "Hidden, which no module has by that name"),
        (lambda: Loose(a=1), "Loose"),
        (lambda: numpy.array([object()]), "ndarray of objects"),
        (lambda: torch.Generator(), "Generator"),
        (lambda: [].append, "list.append"),
        (lambda: Cell().get, "Cell.get"),
        (lambda: {1: Cell().get}, "Cell.get"),
        (lambda: tripled, "double"),
        (lambda: (items := [], items.append(items))[0], "list"),
    ],
)
def test_what_cannot_be_stored_is_asked_for(make, told, tmp_path, caplog):
    raytrainer_log = logging.getLogger("raytrainer")
    raytrainer_log.addHandler(caplog.handler)
    try:
        path = saved(One(value := make()), tmp_path / "x.ckpt")
    finally:
        raytrainer_log.removeHandler(caplog.handler)
    assert "'value' holds a" in caplog.text
    with pytest.raises(ConfigurationError, match=rf"One was made with .*value: it holds a .*{told}.*value=\.\.\."):
        One.load_from_checkpoint(path)
    assert One.load_from_checkpoint(path, value=value).value is value


def forged(path, packed):
    """The checkpoint with another value in its file."""
    content = torch.load(next(path.glob("state-*.pt")), weights_only=True)
    content["hyper_parameters"]["value"] = packed
    return forge(path, content)


@pytest.mark.parametrize(
    "named",
    [
        ("os", "system"), ("posix", "system"), ("own_config", "system"), ("builtins", "eval"), ("builtins", "exec"),
        ("torch", "load"), ("torch", "from_file"), ("torch", "save"), ("torch.hub", "load"), ("subprocess", "Popen"),
        ("torch.nn.functional", "torch"), ("torch.nn.functional", "_infer_size"), ("torch.nn.init", "warnings"),
        ("raytrainer", "seed_everything"), ("own_config", "act.__globals__"),
        ("numpy", "load"), ("numpy", "ctypeslib.load_library"), ("math", "__loader__"), ("no.such.module", "x"),
        ("own_config", "Outer.Missing"), ("functools", "partial"), ("torch.nn.parallel", "DistributedDataParallel.x"),
    ],
)  # fmt: skip
def test_a_file_does_not_choose_what_is_called(named, tmp_path):
    path = forged(saved(One(1), tmp_path / "x.ckpt"), {"raytrainer type": "reference", "value": named})
    with pytest.raises(ConfigurationError, match=r"value: "):
        One.load_from_checkpoint(path)
    assert One.load_from_checkpoint(path, value=2).value == 2


@pytest.mark.parametrize(
    "packed",
    [
        {"raytrainer type": "dataclass", "class": ("own_config", "Config"), "value": {"__class__": 1}},
        {"raytrainer type": "dataclass", "class": ("own_config", "Config"), "value": {"kind": 1}},
        {"raytrainer type": "enum", "class": ("own_config", "Kind"), "value": "C"},
        {"raytrainer type": "enum", "class": ("own_config", "Config"), "value": "C"},
        {"raytrainer type": "namedtuple", "class": ("own_config", "Pair"), "value": [1]},
        {"raytrainer type": "Namespace", "value": {"__class__": 1}},
        {"raytrainer type": "newer than this", "value": 1},
        {"raytrainer type": "Path"},
        {"raytrainer type": "numpy", "is": "array", "value": b"\x80\x04no array"},
    ],
)
def test_damaged_values(packed, tmp_path):
    path = forged(saved(One(1), tmp_path / "x.ckpt"), packed)
    with pytest.raises(ConfigurationError, match=r"value: "):
        One.load_from_checkpoint(path)


def test_a_library_is_allowed_as_torch_says(tmp_path, monkeypatch):
    library = types.ModuleType("some_library")
    library.__file__ = "/usr/lib/python3/site-packages/some_library.py"
    exec("class Block: pass", library.__dict__)
    monkeypatch.setitem(sys.modules, "some_library", library)
    path = saved(One(library.Block), tmp_path / "x.ckpt")
    with pytest.raises(ConfigurationError, match=r"some_library\.Block is neither.*add_safe_globals\(\[Block\]\)"):
        One.load_from_checkpoint(path)
    with torch.serialization.safe_globals([library.Block]):
        assert One.load_from_checkpoint(path).value is library.Block


def test_what_a_script_defines_is_found_where_it_is_imported(tmp_path, monkeypatch):
    script = types.ModuleType("__main__")
    script.__file__ = "/home/me/train_it.py"
    exec("import enum\nclass Mode(enum.Enum):\n    A = 1\ndef act(x): return x", script.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", script)
    paths = [saved(One(value), tmp_path / f"{i}.ckpt") for i, value in enumerate((script.Mode.A, script.act))]
    assert [One.load_from_checkpoint(path).value for path in paths] == [script.Mode.A, script.act]
    monkeypatch.undo()
    with pytest.raises(ConfigurationError, match=r"train_it.*not imported here"):
        One.load_from_checkpoint(paths[0])
    imported = types.ModuleType("train_it")
    imported.__file__ = script.__file__
    exec("import enum\nclass Mode(enum.Enum):\n    A = 1\ndef act(x): return x", imported.__dict__)
    monkeypatch.setitem(sys.modules, "train_it", imported)
    assert [One.load_from_checkpoint(path).value for path in paths] == [imported.Mode.A, imported.act]


# ---------------------------------------------------------------- how __init__ takes them


class Stars(Module):
    def __init__(self, first, *sizes, scale=1.0):
        super().__init__()
        self.save_hyperparameters()
        self.got = (first, sizes, scale)


class Positional(Module):
    def __init__(self, a, b=2, /, c=3, **more):
        super().__init__()
        self.save_hyperparameters()
        self.got = (a, b, c, more)


class Base(Module):
    def __init__(self, width, depth=1, **more):
        super().__init__()
        self.save_hyperparameters()
        self.base = (width, depth, more)


class Forwards(Base):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.save_hyperparameters()
        self.got = (args, kwargs)


class Helped(Module):
    def __init__(self, a, b=1):
        super().__init__()
        self._remember()
        self.got = (a, b)

    def _remember(self):
        self.save_hyperparameters()


@pytest.mark.parametrize(
    "module",
    [
        Stars(1), Stars(1, 2, 3), Stars(1, Kind.A, scale=2.0), Positional(1), Positional(1, 5, 6, x=7),
        Forwards(1), Forwards(1, 2, extra=3), Helped(3, b=4), Helped(3),
    ],
)  # fmt: skip
def test_the_same_call_again(module, tmp_path):
    back = reloaded(module, tmp_path)
    assert back.got == module.got and back.hparams == module.hparams
    assert getattr(back, "base", None) == getattr(module, "base", None)


def test_a_name_given_twice():
    with pytest.raises(ConfigurationError, match=r"\['a'\] by position and again by name"):
        Positional(1, a=2)


@dataclass(eq=False)
class Data(DataModule):
    path: str
    sizes: list = field(default_factory=lambda: [1])
    scale: InitVar[int] = 3

    def __post_init__(self, scale):
        super().__init__()
        self.save_hyperparameters()
        self.scaled = scale


def test_dataclasses_save_in_post_init(tmp_path):
    data = Data("p", scale=7)
    assert data.hparams == {"path": "p", "sizes": [1], "scale": 7}
    back = reloaded(data, tmp_path)
    assert (back.path, back.sizes, back.scaled) == ("p", [1], 7)


class Whole(Module):
    def __init__(self, hparams, other=1):
        super().__init__()
        self.save_hyperparameters(hparams)
        self.given, self.other = hparams, other


class WholeData(DataModule):
    def __init__(self, conf):
        super().__init__()
        self.save_hyperparameters(conf)
        self.given = conf


class Vars(Module):
    def __init__(self, args):
        super().__init__()
        self.save_hyperparameters(vars(args))
        self.given = args


GIVEN = [
    {"lr": 0.1, "kind": Kind.A}, AttributeDict(lr=0.1, kind=Kind.A), {}, argparse.Namespace(lr=0.1, kind=Kind.A),
    Config(pathlib.Path("p")), types.SimpleNamespace(lr=0.1, kind=Kind.A),
]  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "given"),
    [(cls, given) for cls in (Whole, WholeData) for given in GIVEN] + [(Vars, given) for given in GIVEN[3:]],
    ids=lambda value: value.__name__ if isinstance(value, type) else f"{type(value).__name__}-{len(repr(value))}",
)
def test_one_argument_item_by_item(cls, given, tmp_path):
    module = cls(given)
    back = reloaded(module, tmp_path)
    assert type(back.given) is type(given) and back.given == given and back.hparams == module.hparams


def test_items_that_have_changed_since(tmp_path):
    module = Whole({"lr": 0.1, "deep": {"x": 1}}, other=5)
    module.hparams.lr = 0.01
    back = reloaded(module, tmp_path)
    assert back.given == {"lr": 0.01, "deep": {"x": 1}} and module.given["lr"] == 0.1
    back = reloaded(module, tmp_path, lr=0.5, other=7)
    assert back.given == {"lr": 0.5, "deep": {"x": 1}} and back.hparams.lr == 0.5 and back.other == 7
    assert reloaded(module, tmp_path, hparams={"lr": 2}).given == {"lr": 2}


class Secret(Module):
    def __init__(self, width=1, secret="s"):
        super().__init__()
        self.save_hyperparameters()


class Careful(Secret):
    def __init__(self, width=1, secret="s", more=2):
        super().__init__(width, secret)
        self.save_hyperparameters(ignore=["secret"])


def test_ignore_removes_what_a_base_has_saved():
    module = Careful(3, "key")
    assert module.hparams == module.hparams_initial == {"width": 3, "more": 2}


def test_equal_names_with_other_values_in_module_and_datamodule(local_trainer):
    class D(DataModule):
        def __init__(self, width, lr):
            super().__init__()
            self.save_hyperparameters()

    with pytest.raises(ConfigurationError, match=r"width: 1 in Secret, 2 in D"):
        logged_hyperparameters(local_trainer(max_epochs=1)._begin("fit", Secret(1), D(2, 0.1), {}).task)
    logged_hyperparameters(local_trainer(max_epochs=1)._begin("fit", Secret(1), D(1, 0.1), {}).task)
    one, two = One(torch.ones(2)), One(torch.ones(2))
    data = D(1, 0.1)
    data.save_hyperparameters({"value": two.hparams.value})
    logged_hyperparameters(local_trainer(max_epochs=1)._begin("fit", one, data, {}).task)


# ---------------------------------------------------------------- load_from_checkpoint's other arguments


def test_arguments_that_nobody_takes_are_left_out(tmp_path, caplog):
    log = logging.getLogger("raytrainer")
    log.addHandler(caplog.handler)
    try:
        back = reloaded(Secret(4), tmp_path, learning_rate=3, weights_only=False)
    finally:
        log.removeHandler(caplog.handler)
    assert back.hparams.width == 4
    assert "Secret.__init__ takes no learning_rate; left out. It takes width, secret." in caplog.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("h.yaml", "width: 7\nsecret: t\n"),
        ("h.json", '{"width": 7, "secret": "t"}'),
        ("h.csv", "key,value\nwidth,7\nsecret,t\n"),
    ],
)
def test_hparams_file(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert reloaded(Secret(4), tmp_path, hparams_file=tmp_path / name).hparams == {"width": 7, "secret": "t"}


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("h.txt", "", "give a .yaml"),
        ("h.yaml", "a: !!python/object/apply:os.system ['true']", "damaged"),
        ("h.json", "[1]", "holds a list"),
        ("none.json", None, "cannot be read"),
    ],
)
def test_hparams_files_that_cannot_be_used(name, text, told, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigurationError, match=told):
        reloaded(Secret(4), tmp_path, hparams_file=tmp_path / name)


def test_strict_against_the_module(tmp_path):
    class Lax(Secret):
        def __init__(self):
            super().__init__()
            self.strict_loading = False

    path = saved(Lax(), tmp_path / "x.ckpt")
    with pytest.raises(ConfigurationError, match=r"strict=True.*strict_loading = False"):
        Lax.load_from_checkpoint(path, strict=True)
    assert isinstance(Lax.load_from_checkpoint(path, strict=False), Lax)


def test_a_class_without_an_init(tmp_path):
    class Bare(Module):
        pass

    class BareData(DataModule):
        pass

    for made in (Bare(), BareData()):
        made.save_hyperparameters({"x": 1})
        assert isinstance(reloaded(made, tmp_path), type(made))


def test_files_of_the_first_version(tmp_path):
    path = saved(One(5), tmp_path / "x.ckpt")
    as_first_version(path)
    assert One.load_from_checkpoint(path).value == 5 and read_checkpoint(path)["hyper_parameters"] == {"value": 5}
    assert raytrainer.CheckpointError is CheckpointError


def test_a_name_that_is_none_is_told():
    """As a forged checkpoint may have it."""

    class Takes(Module):
        def __init__(self, **more):
            super().__init__()

    with pytest.raises(ConfigurationError, match="Takes: 3 among its hyperparameters is no name"):
        construct(Takes, {3: 4}, {}, {})


def test_what_is_left_out_is_said_at_the_first_save_only(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "raytrainer"):
        for made in (Loose(a=1), Loose(a=1)):
            module = One(made)
            for name in ("a.ckpt", "b.ckpt"):
                saved(module, tmp_path / name)
    assert caplog.text.count("is left out of checkpoints") == 2

"""`self.log` inside a worker: what each hook's defaults are, how names fork, how an epoch's value is reduced."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raytrainer.errors import MetricError
from raytrainer.metrics.metric_board import reduce_partials
from raytrainer.metrics.metric_store import MetricStore


def log(store: MetricStore, name: str, value: Any, **options: Any) -> None:
    defaults = {
        "prog_bar": False,
        "logger": None,
        "on_step": None,
        "on_epoch": None,
        "reduce_fx": "mean",
        "sync_dist": False,
        "add_dataloader_idx": True,
        "rank_zero_only": False,
    }
    others = {key: options.pop(key) for key in ("batch_size", "sync_dist_group") if key in options}
    assert options.keys() <= defaults.keys()
    store.log(name, value, tuple({**defaults, **options}.values()), **others)


def make(hook: str = "training_step", rank: int = 0, every: int = 1) -> MetricStore:
    store = MetricStore(rank, every)
    store.hook = hook
    store.begin_batch(torch.zeros(4, 2))
    return store


STEP = [
    "on_train_batch_start",
    "training_step",
    "training_step_end",
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "on_before_backward",
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
    "on_train_batch_end",
]
EPOCH = [
    "validation_step",
    "validation_step_end",
    "test_step",
    "test_step_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_test_batch_start",
    "on_test_batch_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_test_start",
    "on_test_epoch_start",
    "on_test_epoch_end",
]
NEVER = [None, "setup", "teardown", "on_fit_start", "on_fit_end", "on_train_end", "on_validation_end", "on_test_end",
         "predict_step", "on_predict_batch_end", "on_predict_epoch_end", "configure_optimizers"]  # fmt: skip


@pytest.mark.parametrize("hook", [*STEP, *EPOCH])
def test_defaults_by_hook(hook):
    store = make(hook)
    log(store, "x", 2.0)
    report = store.report(end_of_epoch=True)
    assert (report.specs["x"].on_step, report.specs["x"].on_epoch) == (hook in STEP, hook in EPOCH)
    assert report.step == ({"x": 2.0} if hook in STEP else {})
    assert list(report.epoch) == (["x"] if hook in EPOCH else [])


@pytest.mark.parametrize("hook", NEVER)
def test_hooks_without_logging(hook):
    with pytest.raises(MetricError, match=rf"self\.log\('x'.*{hook or 'outside'}"):
        log(make(hook), "x", 1.0)


def test_every_hook_of_a_run_is_decided():
    from raytrainer.module_hooks import ModuleHooks

    hooks = {name for name in vars(ModuleHooks) if name.startswith("on_")}
    undecided = hooks - set(STEP) - set(EPOCH) - {name for name in NEVER if name}
    # before training, model mode hooks and checkpoint hooks: no logging
    for hook in undecided:
        with pytest.raises(MetricError):
            log(make(hook), "x", 1.0)


@pytest.mark.parametrize(
    ("hook", "on_step", "on_epoch", "expected"),
    [
        ("training_step", None, None, (True, False)),
        ("training_step", None, True, (True, True)),
        ("training_step", False, None, (False, True)),
        ("training_step", False, True, (False, True)),
        ("training_step", True, None, (True, False)),
        ("validation_step", None, None, (False, True)),
        ("validation_step", True, None, (True, True)),
        ("validation_step", True, False, (True, False)),
        ("on_train_epoch_end", None, True, (False, True)),
    ],
)
def test_on_step_and_on_epoch(hook, on_step, on_epoch, expected):
    store = make(hook)
    log(store, "x", 1.0, on_step=on_step, on_epoch=on_epoch)
    spec = store.report(end_of_epoch=True).specs["x"]
    assert (spec.on_step, spec.on_epoch) == expected
    forked = all(expected)
    assert (spec.step_name, spec.epoch_name) == (("x_step", "x_epoch") if forked else ("x", "x"))


def epoch_value(store: MetricStore, values: list[Any], weights: list[int] | None = None, **options: Any) -> float:
    for index, value in enumerate(values):
        store.begin_batch(torch.zeros(weights[index] if weights else 4, 2))
        log(store, "x", value, on_epoch=True, **options)
        if index % 2:
            store.report()  # the end of a chunk
    report = store.report(end_of_epoch=True)
    return reduce_partials(report.specs["x"].reduce, [report.epoch["x"]])


@pytest.mark.parametrize(
    ("reduce_fx", "expected"),
    [
        ("mean", 3.0),
        ("avg", 3.0),
        ("sum", 9.0),
        ("min", 1.0),
        ("max", 6.0),
        (torch.mean, 3.0),
        (torch.sum, 9.0),
        (torch.min, 1.0),
        (torch.max, 6.0),
        (torch.amin, 1.0),
        (torch.amax, 6.0),
        (torch.median, 2.0),
        (lambda values: values.prod(), 12.0),
        (lambda values: float(len(values)), 3.0),
    ],
)
def test_reductions(reduce_fx, expected):
    assert epoch_value(make(), [torch.tensor(1.0), 6.0, torch.tensor([2.0])], reduce_fx=reduce_fx) == expected


def test_mean_is_weighted_by_batch_size():
    assert epoch_value(make(), [1.0, 2.0, 3.0], [4, 4, 2]) == pytest.approx((4 + 8 + 6) / 10)
    assert epoch_value(make(), [1.0, 2.0, 3.0], [4, 4, 2], batch_size=1) == 2.0


@pytest.mark.parametrize("size", [3.0, True + 2, torch.tensor(3), torch.tensor([3.0])])
def test_a_batch_size_may_be_any_number(size):
    store = make("validation_step")
    log(store, "x", 1.0, batch_size=size)
    log(store, "x", 5.0, batch_size=1)
    log(store, "x", 9.0, batch_size=0)
    assert reduce_partials("mean", [store.report(end_of_epoch=True).epoch["x"]]) == 2.0


def test_sum_min_and_max_know_no_weights():
    for fx, expected in (("sum", 6.0), ("min", 1.0), ("max", 3.0)):
        assert epoch_value(make(), [1.0, 2.0, 3.0], [4, 4, 2], reduce_fx=fx) == expected


def test_weight_after_the_last_batch_is_one():
    """A value logged at an epoch's end stands for the epoch, not for the size of the last batch."""
    store = make("validation_step")
    log(store, "a", 1.0)
    store.begin_batch(None)
    store.hook = "on_validation_epoch_end"
    log(store, "b", 1.0)
    assert store.report(end_of_epoch=True).epoch["b"].weight == 1


def test_epochs_do_not_mix():
    store = make()
    assert epoch_value(store, [1.0, 3.0]) == 2.0
    assert epoch_value(store, [10.0]) == 10.0
    assert store.report(end_of_epoch=True).epoch == {}


def test_validation_leaves_the_training_sums_alone():
    store = make()
    log(store, "loss", 1.0, on_epoch=True)
    store.switch("evaluate")
    store.hook = "validation_step"
    store.begin_batch(torch.zeros(2))
    log(store, "loss", 100.0)
    assert store.report(end_of_epoch=True).epoch["loss"].total == 200.0
    store.switch("train")
    store.hook = "training_step"
    store.begin_batch(torch.zeros(4))
    log(store, "loss", 3.0, on_epoch=True)
    report = store.report(end_of_epoch=True)
    assert reduce_partials("mean", [report.epoch["loss"]]) == 2.0


def test_values_are_copies_without_graph():
    store = make()
    value = torch.tensor(1.0, requires_grad=True) * 1
    log(store, "x", value)
    with torch.no_grad():
        value.add_(5)
    assert store.report().step == {"x": 1.0}


def test_last_step_value_counts_and_is_reported_once():
    store = make()
    for value in (1.0, 2.0):
        store.begin_batch(None)
        log(store, "x", value)
    assert store.report().step == {"x": 2.0}
    assert store.report().step == {}


def test_dataloader_suffix():
    store = make("validation_step")
    for idx in (0, 1):
        store.loader_idx = idx
        log(store, "x", float(idx))
        log(store, "y", 1.0, add_dataloader_idx=idx == 0)
    names = store.report(end_of_epoch=True).epoch
    assert set(names) == {"x/dataloader_idx_0", "x/dataloader_idx_1", "y/dataloader_idx_0", "y"}


def test_rows_for_loggers():
    store = make(every=2)
    for step in range(4):
        store.begin_batch(None)
        log(store, "x", float(step), on_step=True, on_epoch=True)
        log(store, "hidden", 1.0, logger=False)
        if step == 1:
            log(store, "rare", 7.0)
        if store.is_log_step(step):
            store.note_row(step, 0)
    rows = [(row.step, row.values) for row in store.report().rows]
    assert rows == [(1, {"x_step": 1.0, "rare": 7.0}), (3, {"x_step": 3.0})]


def test_what_is_logged_after_a_report_began_is_left_for_the_next():
    store = make()
    for step in range(3):
        store.begin_batch(torch.zeros(4, 2))
        if step == 2:
            store.begin_report()
        log(store, "x", torch.tensor(float(step)), on_epoch=True, batch_size=step + 1)
        store.note_row(step, 0)
    first, second = store.finish_report(), store.report(end_of_epoch=True)
    assert [row.step for row in first.rows] == [0, 1] and first.step == {"x": 1.0} and not first.epoch
    assert [row.step for row in second.rows] == [2] and second.step == {"x": 2.0}
    assert second.epoch["x"].total == 0 * 1 + 1 * 2 + 2 * 3 and second.epoch["x"].weight == 6
    first.add(second)
    assert [row.step for row in first.rows] == [0, 1, 2] and first.step == {"x": 2.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_modules_see_the_type_that_they_logged(dtype):
    store = make()
    store.in_batches = True
    store.begin_batch(None)
    value = torch.tensor(1, dtype=dtype)
    log(store, "x", value, on_step=True)
    value.zero_()
    shown = store.show().callback["x"]
    assert shown.dtype is dtype and shown == 1
    store.begin_batch(None)
    log(store, "x", 2, on_step=True)
    assert store.show().callback["x"].dtype is torch.float64
    assert store.report().step == {"x": 2.0}


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (0, [])])
def test_log_steps(every, steps):
    store = MetricStore(0, every)
    assert [step for step in range(4) if store.is_log_step(step)] == steps


def test_only_rank_zero_reports_unsynced_step_values():
    for rank, sync, expected in ((0, False, {"x": 1.0}), (1, False, {}), (1, True, {"x": 1.0})):
        store = make(rank=rank)
        log(store, "x", 1.0, sync_dist=sync)
        assert store.report().step == expected


def test_rank_zero_only():
    for rank in (0, 1):
        store = make("validation_step", rank=rank)
        log(store, "x", 1.0, rank_zero_only=True)
        assert ("x" in store.report(end_of_epoch=True).epoch) is (rank == 0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1.0), (True, 1.0), (2.5, 2.5), (torch.tensor(3), 3.0), (torch.tensor([[4.0]]), 4.0),
     (torch.tensor(True), 1.0), (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
     (torch.tensor(0.1, dtype=torch.float64), 0.1), (float("inf"), float("inf"))],
)  # fmt: skip
def test_values(value, expected):
    store = make()
    log(store, "x", value)
    assert store.report().step == {"x": expected}


def test_numpy_values():
    numpy = pytest.importorskip("numpy")
    store = make()
    log(store, "a", numpy.float32(0.5))
    log(store, "b", numpy.float64(0.25))
    log(store, "c", numpy.int64(3))
    assert store.report().step == {"a": 0.5, "b": 0.25, "c": 3.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": torch.zeros(2)}, r"'x'.*shape \(2,\).*one element"),
        ({"value": "1"}, r"'x'.*'1'.*number or a tensor"),
        ({"value": {"a": 1}}, r"log_dict for a mapping"),
        ({"value": None}, r"'x', None"),
        ({"on_step": False, "on_epoch": False}, r"no effect"),
        ({"reduce_fx": "median"}, r"reduce_fx='median'.*'max', 'mean', 'min', 'sum'.*or a function"),
        ({"sync_dist_group": object()}, r"sync_dist_group"),
        ({"name": ""}, r"give a name"),
        ({"value": torch.tensor(1 + 2j)}, r"'x', <tensor of torch.complex64>\): log a real number"),
        ({"value": torch.tensor([1 + 2j])}, r"log a real number"),
        *(
            ({"batch_size": size, "on_epoch": True}, rf"'x', ..., batch_size={shown}\): give the number of samples")
            for size, shown in [
                (-1, "-1"),
                (-0.5, "-0.5"),
                ("4", "'4'"),
                ([4], r"\[4\]"),
                (float("nan"), "nan"),
                (float("inf"), "inf"),
                (torch.tensor(-1), r"<Tensor of shape \(\)>"),
                (torch.ones(2), r"<Tensor of shape \(2,\)>"),
            ]
        ),
    ],
)
def test_refused(options, message):
    options = {"name": "x", "value": 1.0, **options}
    with pytest.raises(MetricError, match=message):
        log(make(), **options)


def test_step_values_in_hooks_without_steps():
    with pytest.raises(MetricError, match=r"on_step=True\) in on_train_epoch_end: there is no step"):
        log(make("on_train_epoch_end"), "x", 1.0, on_step=True)


def test_options_must_stay_the_same():
    store = make()
    log(store, "x", 1.0)
    with pytest.raises(MetricError, match=r"'x'.*training_step with other options"):
        log(store, "x", 1.0, on_epoch=True)
    store.hook = "on_train_batch_end"
    log(store, "x", 1.0, on_epoch=True)  # another hook is another entry
    for _ in range(2):  # a function that is written in the call is a new object each time
        log(store, "y", 1.0, on_epoch=True, reduce_fx=lambda values: values.sum())
    with pytest.raises(MetricError, match="other options"):
        log(store, "y", 1.0, on_epoch=True, reduce_fx=lambda values: values.prod())

"""Checkpoints of Lightning 2.x: single files of torch's, read without executing anything, in this package's layout."""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import datetime
import io
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import IO, Any

import torch

from raytrainer.errors import CheckpointError
from raytrainer.hparams import AttributeDict
from raytrainer.plan.steps_and_epochs import Progress

__all__ = ["read_lightning_file"]

#: Classes in Lightning's files that are only data, by the names that they have there.
DATA: list[Any] = [
    argparse.Namespace,
    collections.Counter,
    collections.defaultdict,
    collections.deque,
    datetime.timedelta,
    *(
        (kind, f"{module}.{kind.__name__}")
        for kind in (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.WindowsPath, pathlib.PureWindowsPath)
        for module in ("pathlib", "pathlib._local")  # as Python 3.13 names it
    ),
    *(
        (AttributeDict, f"{name}.AttributeDict")
        for name in (
            "lightning.fabric.utilities.data",
            "lightning_fabric.utilities.data",
            "lightning.pytorch.utilities.parsing",
            "pytorch_lightning.utilities.parsing",
        )
    ),
]

#: How torch names what it does not make while it reads plain data.
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")

#: Lightning's own callbacks, whose states mean nothing to those here; `EarlyStopping`'s is translated.
CALLBACKS = {
    "BackboneFinetuning", "BaseFinetuning", "BatchSizeFinder", "EMAWeightAveraging", "EarlyStopping",
    "LearningRateFinder", "ModelCheckpoint", "ModelPruning", "OnExceptionCheckpoint", "SpikeDetection",
    "StochasticWeightAveraging", "ThroughputMonitor", "Timer", "WeightAveraging",
}  # fmt: skip


def read_lightning_file(
    source: str | IO[bytes] | io.BytesIO, shown: str, map_location: Any = "cpu", weights_only: bool | None = None
) -> dict[str, Any]:
    """A checkpoint as `read_checkpoint` gives it. What it says beside that stays in it, for the hooks of a Module.

    Args:
        source: A local file, or an open one.
        shown: What to call it in errors.
        map_location: As for `torch.load`.
        weights_only: False: if there is more in it than plain data, have Python execute what it asks for.

    Raises:
        CheckpointError: It is none, is damaged, or holds objects of classes that are not known to be only data.
    """
    try:
        with _known_data():
            content = torch.load(source, map_location=map_location, weights_only=True)
    except Exception as error:
        if weights_only is not False:
            raise CheckpointError(_why_not(shown, error)) from None
        if not isinstance(source, str):
            source.seek(0)
        content = torch.load(source, map_location=map_location, weights_only=False)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise CheckpointError(_no_checkpoint(shown, content))
    try:
        return _translated(content)
    except Exception as error:  # something is missing in it, or of another type than Lightning writes
        raise CheckpointError(
            f"{shown}: this is no checkpoint as Lightning 2 writes them: {type(error).__name__}: {error}"
        ) from error


def _no_checkpoint(shown: str, content: Any) -> str:
    text = f"{shown}: this is a file of torch's, but no checkpoint: it has no state_dict."
    if isinstance(content, dict) and content and all(isinstance(value, torch.Tensor) for value in content.values()):
        text += " It holds tensors by name, as one itself does: module.load_state_dict(torch.load(path)) takes it up."
    return text


def _why_not(shown: str, error: Exception) -> str:
    what = f"{shown}: no checkpoint there: neither a directory with a meta.json, nor a file of Lightning's"
    found = _REFUSED.search(str(error))
    if found is None:  # no file of torch's at all
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "Unsupported" in line or "Error:" in line), lines[0])
        return f"{what}: torch cannot read it ({reason.strip()})."
    return (
        f"{what} that holds plain data only: it holds {found[1]}. If you trust the file, allow the class with "
        f"torch.serialization.add_safe_globals([...]), or everything that is in it with weights_only=False."
    )


@contextlib.contextmanager
def _known_data() -> Iterator[None]:
    with torch.serialization.safe_globals([*DATA, *_numpy_data()]):
        yield


def _numpy_data() -> list[Any]:
    """What pickled arrays and scalars are made of."""
    try:
        import numpy
    except ImportError:
        return []
    from numpy._core import multiarray  # type: ignore[attr-defined]  # where pickles have it

    kinds = [type(numpy.dtype(code)) for code in numpy.typecodes["All"] if code not in "OV"]
    makers: Any = [multiarray._reconstruct, multiarray.scalar]
    named = [(maker, f"numpy.{core}.multiarray.{maker.__name__}") for maker in makers for core in ("core", "_core")]
    return [numpy.ndarray, numpy.dtype, *named, *dict.fromkeys(kinds)]


# ---------------------------------------------------------------- translation


def _translated(content: dict[str, Any]) -> dict[str, Any]:
    made = dict(content)
    for prefix in ("", "datamodule_"):
        values = content.get(f"{prefix}hyper_parameters") or {}
        values = vars(values) if isinstance(values, argparse.Namespace) else dict(values)
        made[f"{prefix}hyper_parameters"] = values
        made[f"{prefix}hyper_parameters_origin"] = {
            "argument": content.get(f"{prefix}hparams_name"),
            "names": list(values),
            "given": AttributeDict(values),
        }
    made["made_by"] = f"Lightning {content.get('pytorch-lightning_version', '')}".strip()
    if "optimizer_states" in content and "loops" in content:
        made |= _to_resume(content)
    return made


def _to_resume(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a run goes on with, and what of it is left out."""
    progress, left_out = _progress(content)
    callbacks, dropped = _callback_states(content.get("callbacks") or {})
    left_out += [f"the state of {name}" for name in dropped]
    left_out += ["random generators (Lightning does not save them)"]
    precision: Mapping[str, Any] = next(
        (content[name] for name in ("MixedPrecision", "MixedPrecisionPlugin") if name in content), {}
    )
    return {
        "progress": vars(progress),
        "epoch": progress.epoch,
        "global_step": progress.step,
        "callbacks": callbacks,
        "worker_callbacks": callbacks,
        "precision": precision,
        "metrics": {},
        "should_stop": False,
        "left_out": left_out,
    }


def _progress(content: Mapping[str, Any]) -> tuple[Progress, list[str]]:
    loops = content["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]
    done, step = batches["current"]["processed"], content["global_step"]
    total = batches["total"]["processed"]
    # Lightning steps the schedulers of an epoch before it saves at the epoch's end
    over = batches["is_last_batch"] or epochs["processed"] >= epochs["ready"]
    counts = {"total_batches": total, "step": step, "row": max(0, step - 1)}
    if over or not done:
        return Progress(epoch=epochs["ready"] if over else content["epoch"], **counts), []
    within = Progress(epoch=content["epoch"], batch=done, **counts)
    return within, [f"the sums of the metrics of epoch {within.epoch} so far", "its order, if it is shuffled"]


def _callback_states(states: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """States by the keys that they have here; and what cannot be used."""
    kept, dropped = {}, []
    for key, state in states.items():
        name = key.partition("{")[0]
        if name == "EarlyStopping" and key != name:
            which = ast.literal_eval(key.removeprefix(name))
            kept[f"EarlyStopping(monitor={which['monitor']!r}, mode={which['mode']!r})"] = state
        elif name in CALLBACKS:
            dropped.append(name)
        else:
            kept[key] = state
    return kept, dropped

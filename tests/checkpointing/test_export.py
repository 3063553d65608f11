"""Exports over earlier ones: a reader finds the old weights or the new ones, whatever the disk does."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import raytrainer as rt
from raytrainer.checkpointing.checkpoint_format import write_checkpoint

safetensors = pytest.importorskip("safetensors.torch")

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    """Two, of modules whose weights are all 0 and all 1."""
    paths = [tmp_path / "0.ckpt", tmp_path / "1.ckpt"]
    for value, path in enumerate(paths):
        state = {f"layer{number}.weight": torch.full((20,), float(value)) for number in range(6)}
        write_checkpoint(path, {"state_dict": state})
    return paths


def found(folder: Path) -> dict[str, Tensor] | None:
    """What a reader finds: the one file, else what the index names."""
    if (folder / ONE).exists():
        one: dict[str, Tensor] = safetensors.load_file(folder / ONE)
        return one
    if not (folder / INDEX).exists():
        return None
    named = json.loads((folder / INDEX).read_text())["weight_map"]
    return {name: safetensors.load_file(folder / file)[name] for name, file in named.items()}


def values(folder: Path) -> set[float] | None:
    state = found(folder)
    return state and {value for tensor in state.values() for value in tensor.tolist()}  # type: ignore[return-value]


@pytest.mark.parametrize(
    "sizes", [("5GB", "5GB"), (200, 200), ("5GB", 200), (200, "5GB"), (100, 200)],
    ids=["one over one", "three over three", "three over one", "one over three", "three over six"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_each_call_of_the_disk_fails(
    sizes: tuple[Any, Any], kind: type[BaseException], checkpoints: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """After Ctrl-C at any of them all that is left is as a kill there would leave it."""
    asked = 0

    def export(at: int) -> Path:
        """The one of all 1 over that of all 0; call number `at` fails."""
        nonlocal asked
        folder, asked = tmp_path / f"out{at}", 0
        rt.export_weights(checkpoints[0], folder, max_file_size=sizes[0])

        def failing(call: Callable[..., Any]) -> Callable[..., Any]:
            def fail(*args: Any, **kwargs: Any) -> Any:
                nonlocal asked
                asked += 1
                if asked == at:
                    raise kind(errno.EIO, "Input/output error")
                return call(*args, **kwargs)

            return fail

        with monkeypatch.context() as patch:
            for name in ("replace", "fsync", "unlink"):
                patch.setattr(os, name, failing(getattr(os, name)))
            if not at:
                rt.export_weights(checkpoints[1], folder, max_file_size=sizes[1])
                return folder
            try:
                rt.export_weights(checkpoints[1], folder, max_file_size=sizes[1])
            except rt.CheckpointError as error:
                assert kind is OSError and "the weights cannot be written: [Errno 5] Input/output error" in str(error)
            except KeyboardInterrupt:
                assert kind is KeyboardInterrupt
        return folder

    folder = export(0)
    assert values(folder) == {1.0} and not list(folder.glob(".*"))
    for at in range(1, asked + 1):
        folder = export(at)
        assert values(folder) in (None, {0.0}, {1.0}), at
        assert kind is KeyboardInterrupt or not list(folder.glob(".*")), at


def test_files_of_others_stay(checkpoints: list[Path], tmp_path: Path) -> None:
    for name in (ONE, INDEX, "model-00002-of-00003.safetensors"):
        (tmp_path / name).write_text("[]")
        for size in ("5GB", 200):
            if (name, size) != ("model-00002-of-00003.safetensors", "5GB"):
                with pytest.raises(rt.CheckpointError, match=f"{name}: what is there holds no weights, and is not re"):
                    rt.export_weights(checkpoints[0], tmp_path, max_file_size=size)
        assert (tmp_path / name).read_text() == "[]"
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "0.ckpt", "1.ckpt"])
        (tmp_path / name).unlink()

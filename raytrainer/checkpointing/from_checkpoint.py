"""`load_from_checkpoint` of modules and DataModules."""

from __future__ import annotations

import csv
import json
import os
from ast import literal_eval
from collections.abc import Mapping
from typing import IO, Any

from torch import Tensor

from raytrainer.checkpointing.checkpoint_format import read_checkpoint
from raytrainer.checkpointing.places import CheckpointPath
from raytrainer.checkpointing.weights import load_into
from raytrainer.errors import CheckpointError, ConfigurationError
from raytrainer.init_calls import construct

__all__ = ["load_datamodule", "load_module"]


def load_module(
    cls: type[Any],
    path: CheckpointPath | IO[bytes],
    map_location: Any,
    hparams_file: str | os.PathLike[str] | None,
    strict: bool | None,
    weights_only: bool | None,
    overrides: Mapping[str, Any],
) -> Any:
    """See `Module.load_from_checkpoint`."""
    checkpoint = read_checkpoint(path, map_location, (cls,), weights_only)
    if not isinstance(checkpoint.get("state_dict"), Mapping):
        raise CheckpointError(f"{path}: it has no state_dict, so there are no weights to load.")
    module = _constructed(cls, checkpoint, "", hparams_file, overrides)
    if strict and not module.strict_loading:
        raise ConfigurationError(
            f"load_from_checkpoint(strict=True), but {cls.__name__} sets strict_loading = False; make both the same."
        )
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    load_into(module, checkpoint["state_dict"], module.strict_loading if strict is None else strict)
    device = next((value.device for value in checkpoint["state_dict"].values() if isinstance(value, Tensor)), None)
    return module if device is None else module.to(device)


def load_datamodule(
    cls: type[Any],
    path: CheckpointPath | IO[bytes],
    map_location: Any,
    hparams_file: str | os.PathLike[str] | None,
    weights_only: bool | None,
    overrides: Mapping[str, Any],
) -> Any:
    """See `DataModule.load_from_checkpoint`."""
    checkpoint = read_checkpoint(path, map_location, (cls,), weights_only)
    datamodule = _constructed(cls, checkpoint, "datamodule_", hparams_file, overrides)
    # Lightning has it under the class's name
    datamodule.load_state_dict(checkpoint.get("datamodule") or checkpoint.get(cls.__qualname__) or {})
    return datamodule


def _constructed(
    cls: type[Any],
    checkpoint: dict[str, Any],
    prefix: str,
    hparams_file: str | os.PathLike[str] | None,
    overrides: Mapping[str, Any],
) -> Any:
    saved = checkpoint.get(f"{prefix}hyper_parameters") or {}
    origin = checkpoint.get(f"{prefix}hyper_parameters_origin") or {}
    if hparams_file is not None:
        saved, origin = _from_file(os.fspath(hparams_file)), {}
    return construct(cls, saved, origin, overrides)


def _from_file(path: str) -> dict[str, Any]:
    """Hyperparameters from a ".yaml", ".json", or ".csv" file (whose columns are "key" and "value")."""
    kind = os.path.splitext(path)[1].lower()
    if kind not in (".yaml", ".yml", ".json", ".csv"):
        raise ConfigurationError(f"hparams_file={path!r}: give a .yaml, .yml, .json or .csv file.")
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            if kind == ".csv":
                return {row[0]: _value(row[1]) for row in list(csv.reader(stream))[1:]}
            found = json.load(stream) if kind == ".json" else _yaml(stream.read())
    except OSError as error:
        raise ConfigurationError(f"hparams_file={path!r} cannot be read: {error}") from None
    except ValueError as error:
        raise ConfigurationError(f"hparams_file={path!r} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"hparams_file={path!r} holds a {type(found).__name__}; give names and values.")
    return found


def _value(text: str) -> Any:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _yaml(text: str) -> Any:
    import yaml  # of ray's

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(error) from None

"""`Module`: the user's science. A torch.nn.Module with steps and hooks; no loops and no device calls."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from raytrainer.cells import html_table
from raytrainer.class_only import only_on_the_class
from raytrainer.data.data_hooks import DataHooks
from raytrainer.errors import ConfigurationError
from raytrainer.hparams import HyperparametersMixin
from raytrainer.module_hooks import ModuleHooks
from raytrainer.strategies.clipping import clip_whole_gradients
from raytrainer.view.added_groups import cover_groups

if TYPE_CHECKING:
    from raytrainer.checkpointing.places import CheckpointPath

__all__ = ["Module"]


class Module(HyperparametersMixin, DataHooks, ModuleHooks):
    """Write `training_step` and `configure_optimizers`; override any hook you need.

    While it trains, `self.trainer` is a view of the run, `self.device` the device that parameters, buffers and batches
    are on. After `fit` the driver's object holds the trained weights and buffers.
    """

    #: Set to False, in `__init__` or in the class, to call optimizers yourself, with `self.optimizers()` and
    #: `self.manual_backward`.
    automatic_optimization: bool = True

    #: Whether `load_from_checkpoint` and resuming demand that the keys of the state dicts match exactly.
    strict_loading: bool = True

    def __repr__(self) -> str:
        """torch's tree of modules where it is short, else the parts alone."""
        tree = super().__repr__()
        if tree.count("\n") < 30:
            return tree
        parts = "\n".join(f"  ({name}): {kind}, {count} parameters" for name, kind, count in self._parts())
        return f"{type(self).__name__}(\n{parts}\n)"

    def _repr_html_(self) -> str:
        """For notebooks: a table of the parts."""
        total = sum(p.numel() for p in self.parameters() if not isinstance(p, UninitializedParameter))
        rows = [("Name", "Type", "Parameters"), *self._parts()]
        return html_table(rows, [f"{type(self).__name__}: {total:,} parameters"], numbers=[2])

    def _parts(self) -> list[tuple[str, str, str]]:
        known = [
            (name, child, [p.numel() for p in child.parameters() if not isinstance(p, UninitializedParameter)])
            for name, child in self.named_children()
        ]
        return [(name, type(child).__name__, f"{sum(sizes):,}") for name, child, sizes in known]

    # ---------------------------------------------------------------- optimisation

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizer, or the list of them if there are several.

        Each is torch's own but for `optimizer.optimizer` (that one) and `with optimizer.toggle_model(sync_grad=...)`.

        Args:
            use_pl_optimizer: False: torch's own objects, whose steps know nothing of precision="16-mixed".
        """
        optimizers = (use_pl_optimizer and self.trainer.given_optimizers) or self.trainer.optimizers
        return optimizers[0] if len(optimizers) == 1 else optimizers

    def lr_schedulers(self) -> Any:
        """The scheduler, the list of them if there are several, or None."""
        cover_groups(self.trainer.lr_scheduler_configs)  # whoever asks is about to step them
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return None if not schedulers else schedulers[0] if len(schedulers) == 1 else schedulers

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients before the step; by default as the Trainer's arguments say."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of the optimizer's parameters by their total norm ("norm") or each value ("value").

        Args:
            optimizer: Whose gradients.
            gradient_clip_val: How much they may be. Default: the Trainer's; None there too: they are left as they are.
            gradient_clip_algorithm: "norm" or "value". Default: the Trainer's.

        Raises:
            ConfigurationError: The Trainer has other values, of which one would win without a word.
        """
        view = self.__dict__.get("_view")
        if view is not None and view.gradient_clip_val is not None:
            ours = (view.gradient_clip_val, view.gradient_clip_algorithm)
            given = (gradient_clip_val or ours[0], gradient_clip_algorithm or ours[1])
            if given != ours:
                raise ConfigurationError(
                    f"clip_gradients(gradient_clip_val={given[0]!r}, gradient_clip_algorithm={given[1]!r}), where the "
                    f"Trainer has {ours[0]!r} and {ours[1]!r}: give them in one place; to clip otherwise from step to "
                    f"step, leave the Trainer's gradient_clip_val out and override configure_gradient_clipping."
                )
            gradient_clip_val, gradient_clip_algorithm = ours
        if gradient_clip_algorithm not in (None, "norm", "value"):
            raise ConfigurationError(f'gradient_clip_algorithm={gradient_clip_algorithm!r}: give "norm" or "value".')
        if gradient_clip_val is None:
            return
        if view is not None:
            view.unscale(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        clip = clip_whole_gradients if view is None else view.strategy.clip_gradients
        clip(parameters, gradient_clip_val, gradient_clip_algorithm or "norm")

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """In manual optimization, call this instead of `loss.backward()`: it scales and synchronises gradients."""
        if self.automatic_optimization:
            raise ConfigurationError(
                "manual_backward() with automatic optimization: set self.automatic_optimization = False in __init__, "
                "or return the loss from training_step."
            )
        self.trainer.manual_backward(loss, *args, **kwargs)

    def toggle_optimizer(self, optimizer: Optimizer) -> None:
        """Let only this optimizer's parameters require gradients, until `untoggle_optimizer`."""
        if "_toggled" in self.__dict__:
            self.untoggle_optimizer(optimizer)
        own = {p for group in optimizer.param_groups for p in group["params"]}
        states: dict[Tensor, bool] = {}
        for other in self.trainer.optimizers:
            for group in other.param_groups:
                for parameter in group["params"]:
                    if parameter not in states:
                        states[parameter] = parameter.requires_grad
                        parameter.requires_grad = parameter.requires_grad and parameter in own
        self.__dict__["_toggled"] = states
        self.trainer.strategy.refresh(self)

    def untoggle_optimizer(self, optimizer: Optimizer) -> None:
        """Undo `toggle_optimizer`."""
        for parameter, requires_grad in self.__dict__.pop("_toggled", {}).items():
            parameter.requires_grad = requires_grad
        self.trainer.strategy.refresh(self)

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer) -> Iterator[None]:
        """`toggle_optimizer` for the length of a `with` block."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    # ---------------------------------------------------------------- all workers

    def all_gather(self, data: Any, group: Any | None = None, sync_grads: bool = False) -> Any:
        """Gather tensors of all workers: each tensor in `data` becomes one of shape (workers, *shape).

        All workers must call it, with equal shapes. With `sync_grads`, gradients flow back to each worker's part.
        Workers that split layers among them have the same rows, and all give these; the `group` of those that have
        different ones is `self.device_mesh["data_parallel"].get_group()`.
        """
        return self.trainer.all_gather(data, group=group, sync_grads=sync_grads)

    # ---------------------------------------------------------------- weights

    def freeze(self) -> Self:
        """No parameter requires gradients; evaluation mode."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        return self.eval()

    def unfreeze(self) -> Self:
        """All parameters require gradients; training mode."""
        for parameter in self.parameters():
            parameter.requires_grad = True
        return self.train()

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: CheckpointPath | IO[bytes],
        map_location: Any = "cpu",
        hparams_file: str | os.PathLike[str] | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **overrides: Any,
    ) -> Self:
        """Construct the module from a checkpoint: its saved hyperparameters, then its weights. Needs no Ray.

        Args:
            checkpoint_path: A checkpoint's directory, its URI, or Ray's object for it (`result.checkpoint` of a trial);
                or a file of Lightning 2.x.
            map_location: Where to put the weights, as for `torch.load`.
            hparams_file: A .yaml, .json or .csv file to take hyperparameters from instead.
            strict: Whether state-dict keys must match; default: the module's `strict_loading`.
            weights_only: Nothing in a file is ever executed, unless this is False, and the file is one of Lightning's
                that holds more than plain data.
            overrides: Arguments for `__init__` that the checkpoint lacks or that shall differ.

        Raises:
            CheckpointError: No checkpoint, or not a readable one.
            ConfigurationError: An argument of `__init__` is in neither place, or cannot be given back as it was.
        """
        from raytrainer.checkpointing.from_checkpoint import load_module

        module: Self = load_module(cls, checkpoint_path, map_location, hparams_file, strict, weights_only, overrides)
        return module

    def export_weights(self, path: str | Path) -> None:
        """Write the weights alone, for use without raytrainer.

        Args:
            path: A file; ".safetensors" gives that format, anything else a state dict for `torch.load`.
        """
        from raytrainer.checkpointing.weights import export_weights

        export_weights(self, path)


only_on_the_class(Module, "load_from_checkpoint")

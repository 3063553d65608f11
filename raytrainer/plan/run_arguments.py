"""Every argument of a `Trainer` that decides what a run does: its name, type, default, check and meaning, once.

`TrainerArguments` adds those that are objects of the driver. Trainer, frozen settings, `from_config`, the command line
and the reference page are all made from these declarations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from raytrainer.plan import argument_checks as checks
from raytrainer.plan.declaring import argument, arguments
from raytrainer.plan.sharding_settings import FSDP
from raytrainer.plan.strategy_settings import DDP

__all__ = ["RunArguments"]


@arguments
class RunArguments:
    """What a user may say about a run. The attributes of a `Trainer` and of its settings have them in normal form."""

    # ---------------------------------------------------------------- where

    strategy: str | DDP | FSDP = argument(default="auto")
    """"auto" (one worker and no cluster in use: "local", otherwise "ddp"), "local" (the driver's process), "ddp" (one
    batch per worker), "ddp_cpu" (ddp on CPUs), "ddp_spawn" (the same as "ddp"), "ddp2" (one batch per node, split over
    its workers), "dp" (one batch for the job, split over the workers of one node), "fsdp" (one batch per worker, the
    module in shards), "model_parallel" (layers split over the workers of a node); or a `DDP`, `DDP2`, `DP`, `FSDP` or
    `ModelParallel` object, which has settings."""

    num_nodes: int | tuple[int, int] = argument(default=1)
    """Nodes to train on. A pair (fewest, most) makes the run elastic: when workers are lost and not to be had again
    within `placement_timeout`, it goes on with fewer, and grows again when it can."""

    num_processes: int | tuple[int, int] | None = argument(default=None)
    """CPU workers on each node [1]; or a pair, as for `num_nodes`."""

    gpus: int | str | Sequence[int] | None = argument(default=None)
    """GPUs on each node: a number, -1 for all, None or 0 for CPU; or which ones: [0, 2] or "0,2", in PCI bus order (as
    `nvidia-smi` counts), the same on every node; "2-4" is elastic. One GPU without a cluster is used by the driver's
    own process."""

    auto_select_gpus: bool = argument(default=False, check=checks.boolean)
    """Of each node's GPUs, use those that NVML shows free (no process, next to no memory), least loaded first; `gpus`
    is then a number."""

    log_gpu_memory: str | None = argument(default=None, check=checks.choice, allowed=(None, "all", "min_max"))
    """On logging steps, log the memory in use (MiB, by NVML) of every GPU of the job: "all": each, as
    "gpu_memory/node0-gpu1"; "min_max": "gpu_memory/min" and "gpu_memory/max"; None: do not."""

    # ---------------------------------------------------------------- how long

    max_epochs: int | None = argument(
        default=None, check=checks.count, least=0, none=True, minus_one="no limit", unlimited=True
    )
    """Epochs at most [1000 when neither max_steps nor max_time is given]; -1: no limit."""

    min_epochs: int | None = argument(default=1, check=checks.count, least=0, none=True)
    """Epochs before a requested stop (`should_stop`, `EarlyStopping`) is honoured; None: 1. 0: stop at once, within the
    first epoch too."""

    max_steps: int | None = argument(
        default=None, check=checks.count, least=0, none=True, minus_one="no limit", unlimited=True
    )
    """The run ends exactly at this step, whatever `max_epochs` says; -1 or None: no limit. Where manual optimization
    makes several steps in a batch, it ends with the batch in which the step is reached."""

    min_steps: int | None = argument(default=None, check=checks.count, least=0, none=True)
    """A requested stop is honoured from this step on, whatever `min_epochs` says."""

    max_time: str | timedelta | Mapping[str, int] | None = argument(default=None, check=checks.duration)
    """Time to train at most, in each `fit` anew, also where it goes on from a checkpoint: "DD:HH:MM:SS", a timedelta,
    or its arguments as a dict; checked about once a second."""

    # ---------------------------------------------------------------- when to validate

    check_val_every_n_epoch: int | None = argument(default=1, check=checks.count, least=1, none=True)
    """Validate in every n-th epoch; None: count `val_check_interval` across epochs."""

    val_check_interval: int | float | None = argument(default=1.0, check=checks.fraction_or_count, least=1, none=1.0)
    """A float f validates every max(1, int(n * f)) of an epoch's n batches, an int k every k; None: 1.0. 1.0 is the end
    of the epoch, 1 every batch. The count begins anew each epoch, and none is added at its end: 4 in an epoch of 10
    validates after 4 and 8."""

    num_sanity_val_steps: int = argument(default=2, check=checks.count, least=0, minus_one="the whole validation set")
    """Validation batches per loader before training, to find bugs early; 0: none, -1: all. Leaves no metric, no log
    line and no trace in random generators; left out when resuming."""

    # ---------------------------------------------------------------- how much of the data

    limit_train_batches: int | float | None = argument(default=None, check=checks.fraction_or_count, none=None)
    """An int is a number of batches, a float in [0, 1] a fraction, rounded down, of each worker's own; 0 switches
    training off; None: all. A fraction that comes to no batch is an error."""

    limit_val_batches: int | float | None = argument(default=None, check=checks.fraction_or_count, none=None)
    """Likewise, for each validation loader."""

    limit_test_batches: int | float | None = argument(default=None, check=checks.fraction_or_count, none=None)
    """Likewise, for each test loader."""

    limit_predict_batches: int | float | None = argument(default=None, check=checks.fraction_or_count, none=None)
    """Likewise, for each prediction loader."""

    overfit_batches: int | float = argument(default=0.0, check=checks.fraction_or_count)
    """Train on the same, unshuffled batches in every epoch, and validate on as many."""

    fast_dev_run: int | bool = argument(default=False, check=checks.switch_or_count)
    """True or n: run one or n batches of every loader, for one epoch, and write no logs and no checkpoints."""

    use_distributed_sampler: bool = argument(default=True, check=checks.boolean)
    """Shard loaders over workers, and draw their shuffling from (seed, epoch)."""

    reload_dataloaders_every_n_epochs: int = argument(default=0, check=checks.count, least=0)
    """Build loaders anew every n epochs; 0: never."""

    # ---------------------------------------------------------------- optimisation

    gradient_clip_val: float | None = argument(default=None, check=checks.number, above=0.0, zero=True)
    """Clip gradients to this norm or value; None or 0: do not. Only on batches that step, after
    `on_before_optimizer_step`."""

    gradient_clip_algorithm: str | None = argument(
        default=None, check=checks.choice, allowed=("norm", "value"), none="norm"
    )
    """"norm" or "value"; None: "norm"."""

    accumulate_grad_batches: int = argument(default=1, check=checks.count, least=1)
    """Batches per step; the loss is divided by it, and an epoch's last batch always steps."""

    precision: int | str = argument(default=32, check=checks.precision)
    """32, 64, 16 or "16-mixed", "bf16" or "bf16-mixed" (mixed: autocast, and loss scaling for 16), "16-true",
    "bf16-true"; "float8": "bf16" with linear layers that multiply in float8 (extra `float8`, torchao)."""

    deterministic: bool | str = argument(default=False, check=checks.choice, allowed=(False, True, "warn"))
    """True: only deterministic algorithms, an error where there is none; "warn": a warning there. May be slower."""

    benchmark: bool | None = argument(default=None, check=checks.boolean, none=True)
    """True: let cuDNN try kernels and pick the fastest, which pays off while input sizes stay the same; not with
    deterministic=True. None: as torch is set."""

    float32_matmul_precision: str | None = argument(
        default=None, check=checks.choice, allowed=(None, "highest", "high", "medium")
    )
    """"highest", "high" or "medium": how exactly float32 matrices are multiplied on GPUs; "high" uses TF32. None: as
    torch is set."""

    compile: bool | Mapping[str, Any] | None = argument(default=False, check=checks.compile_options)
    """True, or a dict of options of `torch.compile`: compile the module's `forward` and its direct children, in place,
    for the run. Names in state dicts stay as they are."""

    sync_batchnorm: bool = argument(default=False, check=checks.boolean)
    """Normalise by the samples of all workers (`torch.nn.SyncBatchNorm`); on GPUs only."""

    seed: int | None = argument(default=None, check=checks.seed)
    """Seeds generators, shuffling and loader processes in all workers [that of `seed_everything`, if called]."""

    detect_anomaly: bool = argument(default=False, check=checks.boolean)
    """Find the operation that produced a NaN in the backward pass; slow."""

    inference_mode: bool = argument(default=True, check=checks.boolean)
    """Evaluate under `torch.inference_mode` rather than `torch.no_grad`."""

    # ---------------------------------------------------------------- failures and what is told

    log_every_n_steps: int | None = argument(default=50, check=checks.count, least=0, none=True)
    """Give step values to loggers every n steps; 0 or None: never."""

    max_failures: int = argument(default=3, check=checks.count, least=0)
    """Lost workers to recover from in one `fit`: others take their places, and all go on from the newest snapshot or
    checkpoint. Errors of user code are never retried. "local" recovers nothing."""

    snapshot_every: int | str | timedelta | None = argument(default="auto", check=checks.steps_or_duration)
    """In-memory snapshots for that: an int is steps; a "DD:HH:MM:SS" or timedelta is time; "auto": as often as
    costs under 1 % of the time, but for the first one, and at most every 2 s; None: none. With 1, workers of one host
    that hold the same ("ddp", "ddp2", "dp", without accumulation; GPUs where a twentieth of the memory holds four
    copies of the state, CPUs up to 16 MB of weights) copy nothing to the driver: each records its steps, so that a lost
    one costs the step in progress, on GPUs also the one or two queued; all else has snapshots as with "auto"."""

    spares: int | str = argument(default="auto", check=checks.count_or_auto)
    """Processes on each node that wait, without CPUs and GPUs of their own, to take a lost worker's place at once;
    "auto": one, once training has run for 20 s; 0: none, and a process is started when it is needed. Each takes as much
    memory as a worker before it has a model."""

    hang_timeout: float = argument(default=600.0, check=checks.number, above=0.0, none=False)
    """Seconds without an answer from training workers after which they count as lost; longer than any one batch
    takes."""

    worker_output: str = argument(default="rank_zero", check=checks.choice, allowed=("rank_zero", "all"))
    """Whose prints are shown: "rank_zero", while the other workers' go to files that errors name; or "all", each line
    with its rank."""

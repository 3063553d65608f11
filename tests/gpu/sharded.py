"""A Llama in shards, by hand (FSDP2, torchrun), by Lightning's ModelParallelStrategy, and by raytrainer: one table.

    python tests/gpu/sharded.py steps --size 8B --batch 1 --length 8192 --gpus 2 --compile
    python tests/gpu/sharded.py steps --size 1.5B --batch 4 --length 4096 --gpus 2 --compile
    python tests/gpu/sharded.py steps --size 1.5B --batch 4 --length 4096 --gpus 1 --compile --precision float8
    python tests/gpu/sharded.py saving --size 1.5B --batch 4 --length 4096 --gpus 2
    python tests/gpu/sharded.py saving --cpu --gpus 2          # over gloo, a tiny one: whether it works at all

Exits non-zero where raytrainer takes more than its goals allow. Sides run in turn, each `--rounds` times; of the rounds
the least median counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sharded_sides import Job

HERE = Path(__file__).parent

#: What raytrainer may take of what is done by hand.
STEP, PEAK, BLOCKED, SAVE, LOAD = 1.01, 1.02, 1.3, 1.1, 1.1
#: And of DCP's async_save.
OF_DCP = 1 / 20


def run(job: Job) -> dict[str, Any]:
    """One side's run; what it has seen."""
    Path(job.result).unlink(missing_ok=True)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.workers}"]
    command = [sys.executable, *(launch if job.side == "hand" else []), str(HERE / "sharded_sides.py")]
    done = subprocess.run([*command, json.dumps(asdict(job))], capture_output=True, text=True, cwd=HERE)
    if done.returncode or not Path(job.result).exists():
        print(done.stdout[-2000:], done.stderr[-6000:], file=sys.stderr)
        raise SystemExit(f"{job.side} failed with {done.returncode}")
    seen: dict[str, Any] = json.loads(Path(job.result).read_text())
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "saving"])
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", choices=["bf16-mixed", "float8"], default="bf16-mixed")
    parser.add_argument("--all-gather", action="store_true", help="by hand, gather weights in float8 too")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm", type=int, default=8)
    parser.add_argument("--sides", nargs="+", default=None)
    parser.add_argument("--cpu", action="store_true", help="over gloo; goals are not judged")
    args = parser.parse_args()
    saving = args.what == "saving"
    sides = args.sides or (["hand", "ours"] if saving else ["hand", "lightning", "ours"])
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(1 if saving else args.rounds):
            for side in sides:
                job = Job(
                    side=side, size=args.size, batch=args.batch, length=args.length, workers=args.gpus,
                    compiled=args.compile, warm=args.warm, steps=args.steps, saving=saving,
                    precision=args.precision, all_gather=args.all_gather, folder=folder,
                    result=f"{folder}/result.json", cpu=args.cpu,
                )  # fmt: skip
                found[side].append(run(job))
                # what has been measured is not lost when time is up
                print(side, {k: v for k, v in found[side][-1].items() if k != "losses"}, flush=True, file=sys.stderr)
    best = {side: min(runs, key=lambda seen: float(seen["median"])) for side, runs in found.items()}
    wrong = _saving(best) if saving else _steps(best, args)
    if wrong and not args.cpu:
        print(f"\nFAILED: {'; '.join(wrong)}")
        return 1
    return 0


def _steps(best: dict[str, dict[str, Any]], args: argparse.Namespace) -> list[str]:
    hand = best.get("hand")
    tokens = args.batch * args.length
    compiled = ", compiled by block" if args.compile else ""
    print(f"{args.size}, {args.precision}, {args.gpus} x {args.batch} x {args.length} tokens{compiled}\n")
    print(
        "| | median ms | of by hand | mean ms | tokens/s a worker | peak GiB | of by hand | first step s | last loss |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    wrong = []
    for side, seen in best.items():
        ratio = seen["median"] / hand["median"] if hand else float("nan")
        memory = seen["peak"] / hand["peak"] if hand and hand["peak"] else float("nan")
        speed = 1e3 * tokens / seen["median"]
        print(
            f"| {side} | {seen['median']:.2f} | {ratio:.3f} | {seen['mean']:.2f} | {speed:,.0f} | {seen['peak']:.2f} | "
            f"{memory:.3f} | {seen['first']:.1f} | {seen['losses'][-1]:.4f} |"
        )
        if side == "ours" and ratio > STEP:
            wrong.append(f"a step takes {ratio:.3f} of by hand, above {STEP}")
        if side == "ours" and memory > PEAK:
            wrong.append(f"the peak is {memory:.3f} of by hand's, above {PEAK}")
    return wrong


def _saving(best: dict[str, dict[str, Any]]) -> list[str]:
    hand, ours = best.get("hand"), best.get("ours")
    print("| | by hand (DCP) s | raytrainer s |\n|---|---|---|")
    if hand is not None:
        print(f"| state, GiB | {hand['gib']:.2f} | |")
        print(f"| bare copy into kept pinned buffers | {hand['copy']:.3f} | |")
        print(f"| async_save: training blocked | {hand['async_save']:.3f} | |")
    if ours is not None:
        print(f"| save beside training: training blocked, the first time | | {ours['blocked_first']:.3f} |")
        print(f"| the second time | | {ours['blocked']:.3f} |")
    print(f"| save | {hand['save'] if hand else 0:.3f} | {ours['save'] if ours else 0:.3f} |")
    print(f"| load | {hand['load'] if hand else 0:.3f} | {ours['load'] if ours else 0:.3f} |")
    if hand is None or ours is None:
        return []
    limits = [
        (ours["blocked"] / hand["copy"], BLOCKED, "training is blocked {:.2f} times a bare copy"),
        (ours["blocked"] / hand["async_save"], OF_DCP, "training is blocked {:.3f} of DCP's async_save"),
        (ours["save"] / hand["save"], SAVE, "saving takes {:.2f} of DCP's"),
        (ours["load"] / hand["load"], LOAD, "loading takes {:.2f} of DCP's"),
    ]
    return [f"{said.format(ratio)}, above {limit:.2f}" for ratio, limit, said in limits if ratio > limit]


if __name__ == "__main__":
    raise SystemExit(main())

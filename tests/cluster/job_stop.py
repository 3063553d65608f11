"""`ray job stop` while a job trains: the checkpoint of that very step, or the newest one, and nothing left over.

    python tests/cluster/job_stop.py [--megabytes 1 2000]

Submits jobs to a Ray of its own, stops each in the midst of training, and has another one go on. Ray leaves a job three
seconds, so a small state is saved and a large one may not be: then the log names the newest checkpoint. Exits with 1 if
that is not so, or if something is left over.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RAYTRAINER = HERE.parent.parent


def train(root: str, megabytes: int) -> None:
    """The job's script."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    import raytrainer

    class Tells(raytrainer.Callback):
        def on_train_chunk_end(self, trainer: Any, module: Any, report: Any) -> None:
            print(f"at step {trainer.global_step}", flush=True)

        def teardown(self, trainer: Any, module: Any, stage: str) -> None:
            print("torn down", flush=True)

    class Net(raytrainer.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)
            self.register_buffer("large", torch.zeros(megabytes * 2**18))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(0.02)  # what a larger model would take
            return torch.nn.functional.mse_loss(self.layer(batch[0]).squeeze(), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(1))
    saves = raytrainer.ModelCheckpoint(root, every_n_train_steps=50)
    trainer = raytrainer.Trainer(
        strategy="ddp", num_processes=2, max_epochs=100, seed=1, logger=False, callbacks=[Tells(), saves],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(), DataLoader(TensorDataset(x, x.sum(1)), batch_size=2), ckpt_path="last")


def stopped(client: Any, root: Path, megabytes: int, beyond: int) -> tuple[int, list[str]]:
    """Stop a job that has gone so far; at which step it was, and what is wrong."""
    import ray

    command = f"{sys.executable} {Path(__file__).resolve()} --train {root} {megabytes}"
    variables = {"PYTHONPATH": os.pathsep.join([str(RAYTRAINER), os.environ.get("PYTHONPATH", "")])}
    job = client.submit_job(entrypoint=command, runtime_env={"env_vars": variables})

    def lines(begin: str) -> list[str]:
        return [line for line in client.get_job_logs(job).splitlines() if line.startswith(begin)]

    while not any(int(line.split()[-1]) > beyond for line in lines("at step")):
        if client.get_job_status(job).is_terminal():
            return 0, [client.get_job_logs(job)]
        time.sleep(0.2)
    client.stop_job(job)
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.05)
    (said,) = lines("Preempted at step") or [""]
    print(f"{megabytes} MB: {client.get_job_status(job)}: {said}", flush=True)
    bad = [] if said else ["nothing is said of the preemption", client.get_job_logs(job)]
    step = int(said.split()[3].rstrip(",")) if said else 0
    named = next((word.rstrip(",.") for word in said.split() if word.startswith(str(root))), "")
    found = json.loads(Path(named, "meta.json").read_text())["global_step"] if named else None
    if found is None or (found != step and "of which there is no checkpoint" not in said):
        bad.append(f"the checkpoint {named!r} is of step {found}")
    bad += [f"half written: {path}" for path in root.rglob("*-*") if path.name.startswith(("meta-", "new-"))]
    end = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        if time.monotonic() > end:
            bad.append("CPUs are still in use")
            break
        time.sleep(0.2)
    bad += [table["state"] for table in ray.util.placement_group_table().values() if table["state"] != "REMOVED"]
    return found or 0, bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 2000])
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        train(given.train[0], int(given.train[1]))
        return 0

    import ray
    from ray.job_submission import JobSubmissionClient

    bad: list[str] = []
    context = ray.init("local", num_cpus=3, include_dashboard=True, log_to_driver=False)
    try:
        client = JobSubmissionClient(f"http://{context.dashboard_url}")
        for megabytes in given.megabytes:
            with tempfile.TemporaryDirectory() as folder:
                step = 60
                for _ in range(2 if megabytes < 100 else 1):
                    step, wrong = stopped(client, Path(folder), megabytes, step)
                    bad += wrong
                    step += 20
    finally:
        ray.shutdown()
    print("bad:", *(bad or ["nothing"]), sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

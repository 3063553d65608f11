#!/usr/bin/env bash
# Slurm: one allocation, a Ray cluster inside of it, your script on its first node; all of it ends with the allocation.
# From a folder that every node sees, with the environment of README.md in ~/.venvs/raytrainer:
#
#   sbatch cluster/slurm.sh python examples/digits.py --address auto --num-nodes 4 --gpus 1
#
#SBATCH --job-name=raytrainer
#SBATCH --nodes=4
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --no-kill
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# EDIT the first four numbers above (or give them to sbatch, which wins). CPUs: one per training worker, and some left
# for reading data. The others: one Ray a node; nobody else on the nodes, whose Ray would want the same ports; a node
# that fails does not end the job, since the Trainer goes on without it or waits for it; two minutes before the time is
# over this script is told, and has the job queued again (see the end), with one log for all its turns.
set -euo pipefail

[ $# -gt 0 ] || { echo "usage: sbatch cluster/slurm.sh COMMAND [ARGUMENT...]" >&2 && exit 2; }
export PATH="${RAYTRAINER_VENV:-$HOME/.venvs/raytrainer}/bin:$PATH"
port=6379
temp=/tmp/ray-$SLURM_JOB_ID # a short path (sockets), and not /tmp/ray, which may be another user's

# The secret that the nodes share: a file that only you can read, in the home folder that all nodes see.
(umask 077 && ray get-auth-token --generate >/dev/null)
export RAY_AUTH_MODE=token

# Training is what the nodes are for: not with the low priority that Ray gives its workers otherwise.
export RAY_worker_niceness=0
# A node that has not answered 3 times in a row, asked every second, with a second to answer, is dead: about 6 s after
# it vanished, where Ray's defaults take a minute.
export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=1000 RAY_health_check_failure_threshold=3
# newer Slurms hand --cpus-per-task to srun only so
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
ulimit -n 65536 || ulimit -n "$(ulimit -Hn)"

# This script runs on the first node, which is the head. Its address decides on the network: the other nodes take the
# address from which they reach it, and gloo and NCCL in raytrainer's workers the interface that holds their node's
# address. INTERFACE=ib0 chooses InfiniBand's.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if [ -n "${INTERFACE:-}" ]; then
    address=$(ip -4 -o addr show dev "$INTERFACE" | sed -n 's/.* inet \([0-9.]*\).*/\1/p')
else
    read -r address _ < <(hostname -I)
fi

finish() { # however the script ended: no process and no file is left (at the time limit Slurm ends processes itself)
    local steps
    mapfile -t steps < <(jobs -p)
    kill "${steps[@]}" 2>/dev/null || true
    wait || true
    srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --overlap rm -rf "$temp" || true
}
trap finish EXIT

srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" \
    ray start --head --node-ip-address="$address" --port="$port" --num-cpus="$SLURM_CPUS_PER_TASK" \
    --temp-dir="$temp" --block &
if [ "${#nodes[@]}" -gt 1 ]; then
    srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --exclude="${nodes[0]}" \
        --no-kill --kill-on-bad-exit=0 \
        ray start --address="$address:$port" --num-cpus="$SLURM_CPUS_PER_TASK" --temp-dir="$temp" --block &
fi

# All nodes must have joined first: importing Ray from a shared file system can take minutes.
export RAY_ADDRESS=$address:$port
python - "${#nodes[@]}" <<'EOF'
import sys
import time

import ray

wanted, deadline, seen = int(sys.argv[1]), time.monotonic() + 600, "no head"
while True:
    try:
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        joined = sum(node["Alive"] for node in ray.nodes())
        if joined >= wanted:
            break
        seen = f"{joined} of {wanted} nodes"
    except Exception as error:  # until the head is up; what is raised depends on how far it is
        seen = f"no head: {error}"
    if time.monotonic() > deadline:
        sys.exit(f"Ray was not up within 600 s: {seen}")
    time.sleep(2)
EOF

# USR1 comes before the time limit: the Trainer saves the step that it is in and ends with status 143, and the job goes
# back into the queue. So a script that says fit(..., ckpt_path="last") takes as many turns as it needs. TERM is a scancel,
# or a job that Slurm wants the nodes for: the Trainer saves as well, and Slurm knows whether to queue it again.
"$@" &
command=$! again='' told=''
pass_on() { told=yes && kill -TERM "$command" 2>/dev/null || true; }
trap 'again=yes; pass_on' USR1
trap pass_on TERM
while :; do # a signal ends the wait, not the command
    status=0
    wait "$command" || status=$?
    [ -n "$told" ] || break
    told=''
done
if [ -n "$again" ] && [ "$status" = 143 ]; then
    trap - EXIT
    finish
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

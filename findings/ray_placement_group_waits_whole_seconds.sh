#!/usr/bin/env bash
# ray 2.60.0: `PlacementGroup.wait(0.9)` does not wait at all, and `wait(1.9)` waits one second.
#
# Guess: `timeout_seconds`, annotated as a float, is in seconds, as `timeout` is in `ray.wait` and `ray.get`.
# Seen: what is behind the point is cut off. A loop `while not group.wait(0.5)` is a busy one that asks the control
# service hundreds of times a second, and one attempt with half a second tells "not ready" of a group that would have
# been.
#
# Run: findings/ray_placement_group_waits_whole_seconds.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "ray==2.60.0"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging
import time

import ray
from ray.util.placement_group import placement_group

ray.init(num_cpus=1, include_dashboard=False, logging_level="error", log_to_driver=False)
logging.disable(logging.CRITICAL)
group = placement_group([{"CPU": 100}])  # more than there is


def took(wait):
    start = time.monotonic()
    assert not wait()
    return time.monotonic() - start


for asked in (0.9, 1.9):
    fastest = min(took(lambda asked=asked: group.wait(asked)) for _ in range(3))
    by_ray = min(took(lambda asked=asked: ray.wait([group.ready()], timeout=asked)[0]) for _ in range(3))
    print(f"{asked} s: PlacementGroup.wait takes {fastest:.2f} s, ray.wait {by_ray:.2f} s")
    assert fastest < int(asked) + 0.6 and by_ray > asked - 0.05
ray.shutdown()
PYTHON

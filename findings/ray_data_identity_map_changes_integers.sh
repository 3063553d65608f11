#!/usr/bin/env bash
# ray 2.60.0: `map_batches(lambda batch: batch)` turns integers into rounded floats where a null is in their batch.
#
# Guess: a function that returns its batch changes nothing; a null stays a null, an identifier an identifier.
# Seen: batches are numpy by default, where Arrow makes float64 of integers with a null: 9007199254740993 comes back as
# 9007199254740992.0, and the null as NaN, which is a value: `count` of nulls, `min`, `drop` by null no longer see it.
# Batches without a null keep int64, so one dataset is served in two types, by where its batches begin: `iter_batches`
# of the same rows gives int64 then float64 with one batch size and float64 with another. `map`, and batches as pandas,
# keep both. (Depending on the rows, the second kind ends in an ArrowInvalid that names the number, not the cause.)
#
# Run: findings/ray_data_identity_map_changes_integers.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 pandas==3.1.1 pyarrow==26.0.1 "ray[data]==2.60.0"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging

import pyarrow as pa
import ray

ray.init(num_cpus=1, include_dashboard=False, logging_level="error", log_to_driver=False)
logging.disable(logging.CRITICAL)
ray.data.DataContext.get_current().enable_progress_bars = False
big = 2**53 + 1
rows = ray.data.from_arrow(pa.table({"x": pa.array([1, None, big])}))
seen = {
    "map_batches": rows.map_batches(lambda batch: batch),
    "map_batches, pandas": rows.map_batches(lambda batch: batch, batch_format="pandas"),
    "map": rows.map(lambda row: row),
}
for name, dataset in seen.items():
    values = [row["x"] for row in dataset.take_all()]
    print(f"{name}: {values}")
    if name == "map_batches":
        assert values[1] is not None and values[1] != values[1], "NaN, no null"
        assert isinstance(values[0], float) and values[2] == big - 1
    else:
        assert values == [1, None, big]
parts = ray.data.from_arrow([pa.table({"x": pa.array([big, 1])}), pa.table({"x": pa.array([None, 2], pa.int64())})])
for size, expected in ((2, ["int64", "float64"]), (4, ["float64"])):
    types = [str(batch["x"].dtype) for batch in parts.iter_batches(batch_size=size, batch_format="numpy")]
    print(f"batches of {size}: {types}")
    assert types == expected
ray.shutdown()
PYTHON

#!/usr/bin/env bash
# ray 2.60.0: one NaN makes StandardScaler return nothing but nulls, and `sum`, `mean` and `std` None.
#
# Guess: NaN is left out (as in scikit-learn and pandas, and as MinMaxScaler does here), or the sum is NaN, as in numpy;
# "ignore_nulls" is the default.
# Seen: `min` and `max` leave NaN out, `sum`, `mean` and `std` of the same column are None. StandardScaler takes such a
# mean and gives every row of the column a null: a feature is gone, and no error or warning says so.
#
# Run: findings/ray_data_scaler_empties_a_column.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 pandas==3.1.1 pyarrow==26.0.1 "ray[data]==2.60.0"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging

import ray
from ray.data.preprocessors import MinMaxScaler, StandardScaler

ray.init(num_cpus=1, include_dashboard=False, logging_level="error", log_to_driver=False)
logging.disable(logging.CRITICAL)
ray.data.DataContext.get_current().enable_progress_bars = False


def column(dataset):
    return [row["x"] for row in dataset.take_all()]


rows = ray.data.from_items([{"x": 1.0}, {"x": float("nan")}, {"x": 3.0}])
seen = {kind: getattr(rows, kind)("x") for kind in ("sum", "mean", "std", "min", "max")}
print(f"1, NaN, 3: {seen}")
assert seen == {"sum": None, "mean": None, "std": None, "min": 1.0, "max": 3.0}
scaled, bounded = (column(kind(["x"]).fit_transform(rows)) for kind in (StandardScaler, MinMaxScaler))
print(f"StandardScaler {scaled}, MinMaxScaler {bounded}")
assert scaled == [None, None, None] and (bounded[0], bounded[2]) == (0.0, 1.0)
ray.shutdown()
PYTHON

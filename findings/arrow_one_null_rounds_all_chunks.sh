#!/usr/bin/env bash
# pyarrow 26.0.1: one null makes floats of a whole column of integers, chunks without a null included.
#
# Guess: `to_numpy()` of int64 with a null raises, or is an object array, or only that number is NaN; large identifiers
# stay what they are.
# Seen: it is float64, also when the null is in a chunk far away. Integers above 2**53 are rounded: 9007199254740993
# becomes 9007199254740992, and identifiers that differ by one become equal. uint64 likewise, and `numpy.asarray`. The
# same chunk by itself is int64 and exact, so a loader that reads another slice, or a filter that drops the row with the
# null, changes type and values.
#
# Run: findings/arrow_one_null_rounds_all_chunks.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 pyarrow==26.0.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import pyarrow as pa

big = 2**53
column = pa.chunked_array([[big, big + 1], [7, None]])
whole, alone = column.to_numpy(), column.chunk(0).to_numpy()
print(f"whole column: {whole.dtype}, its second number {int(whole[1])}; that chunk alone: {alone.dtype}, {alone[1]}")
assert alone.dtype == np.int64 and alone.tolist() == [big, big + 1]
assert whole.dtype == np.float64 and whole[0] == whole[1] and int(whole[1]) == big
filtered = column.filter(pa.chunked_array([[True, True], [True, False]])).to_numpy()
print(f"without the row of the null: {filtered.dtype}, {filtered[1]}")
assert filtered.dtype == np.int64 and filtered[1] == big + 1
unsigned = np.asarray(pa.chunked_array([pa.array([2**64 - 1, None], pa.uint64())]))
assert unsigned.dtype == np.float64 and unsigned[0] == 2.0**64
PYTHON

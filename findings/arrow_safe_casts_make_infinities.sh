#!/usr/bin/env bash
# pyarrow 26.0.1: a safe cast from float64 to float32 or float16 turns large numbers into infinity.
#
# Guess: `cast(...)` is safe by default: what does not fit raises ArrowInvalid, as with integers and with fractions.
# Seen: integers that float32 cannot hold exactly are refused (16777217), and so is 1.5 into an integer. Between
# floating types nothing is checked: 1e300 is inf in float32 and 70000 is inf in float16, in arrays, chunked arrays and
# tables; "safe" says nothing about them. A column for a half-precision tensor so gets infinities without a word.
#
# Run: findings/arrow_safe_casts_make_infinities.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 pyarrow==26.0.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import math

import pyarrow as pa


def cast(values, kind, to):
    try:
        return pa.array(values, kind).cast(to, safe=True).to_pylist()
    except pa.ArrowInvalid as error:
        return f"ArrowInvalid: {str(error)[:30]}"


for values, kind, to, refused in (
    ([2**24 + 1], pa.int64(), pa.float32(), True),
    ([1.5], pa.float64(), pa.int64(), True),
    ([300], pa.int64(), pa.int8(), True),
    ([1e300], pa.float64(), pa.float32(), False),
    ([70000.0], pa.float64(), pa.float16(), False),
    ([70000.0], pa.float32(), pa.float16(), False),
):
    seen = cast(values, kind, to)
    print(f"{values[0]} from {kind} to {to}: {seen}")
    assert isinstance(seen, str) == refused
    assert refused or seen == [math.inf]
table = pa.table({"x": [1e300]}).cast(pa.schema({"x": pa.float32()}))
assert table["x"].to_pylist() == [math.inf]
PYTHON

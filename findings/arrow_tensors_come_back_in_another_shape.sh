#!/usr/bin/env bash
# pyarrow 26.0.1: a tensor array whose axes were permuted does not come back from Arrow as it went in.
#
# Guess: `FixedShapeTensorArray.from_numpy_ndarray(x).to_numpy_ndarray()` is x, since strides in any order are accepted
# and kept as the type's `permutation`; and `array[i].to_numpy()` is x[i].
# Seen: the whole array is right for a transposed matrix and other permutations that are their own inverse. For axes
# that go around, as of images seen in NCHW that lie in memory as NHWC, the type gets the inverse of what the format
# defines: (2, 4, 2, 3) comes back as (2, 3, 4, 2), here and in whatever reads it, and where axes are equally long, in
# the right shape with its elements in other places. One element, `array[i].to_numpy()`, is wrong even for a transposed
# matrix: right shape, wrong strides, so that some numbers come twice and others not at all. `to_pylist()` and
# `to_pandas()` are flat lists in the order of memory.
#
# Run: findings/arrow_tensors_come_back_in_another_shape.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 pyarrow==26.0.1 pandas==3.1.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import pyarrow as pa

for shape, axes, whole, single in (
    ((2, 2, 3), (0, 1, 2), True, True),
    ((2, 2, 3), (0, 2, 1), True, False),
    ((2, 2, 3, 4), (0, 3, 2, 1), True, False),
    ((2, 2, 3, 4), (0, 3, 1, 2), False, False),
    ((2, 3, 3, 3), (0, 3, 1, 2), False, None),
):
    tensors = np.arange(np.prod(shape)).reshape(shape).transpose(axes)
    array = pa.FixedShapeTensorArray.from_numpy_ndarray(tensors)
    back, element = array.to_numpy_ndarray(), array[1].to_numpy()
    equal = np.array_equal(back, tensors), np.array_equal(element, tensors[1])
    print(f"axes {axes}: {tensors.shape} comes back as {back.shape}, equal: {equal[0]}; one element equal: {equal[1]}")
    assert equal[0] == whole and single in (None, equal[1])
assert back.shape == tensors.shape, "equally long axes: the shape is right"
assert array.type.permutation == [1, 2, 0], "logical axis i is axis permutation[i] in memory, so [2, 0, 1] is right"

tensors = np.arange(12).reshape(2, 2, 3).transpose(0, 2, 1)
array = pa.FixedShapeTensorArray.from_numpy_ndarray(tensors)
print(f"{tensors[0].tolist()} is {array[0].to_numpy().tolist()} as one element, {array.to_pylist()[0]} as a list")
assert array[0].to_numpy().tolist() == [[0, 2], [1, 3], [2, 4]] and tensors[0].tolist() == [[0, 3], [1, 4], [2, 5]]
assert array.to_pylist()[0] == [0, 1, 2, 3, 4, 5]
assert pa.table({"x": array}).to_pandas()["x"][0].tolist() == [0, 1, 2, 3, 4, 5]
PYTHON

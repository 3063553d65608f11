#!/usr/bin/env bash
# cloudpickle 3.1.2: CloudPickler takes a dispatch_table only from its class; one set on the instance is ignored.
#
# Guess: as the docs of `pickle` have it, a pickler's private table is its attribute `dispatch_table`, set on the
# instance: `pickler = CloudPickler(file); pickler.dispatch_table = {...}`.
# Seen: the assignment is accepted and has no effect: the object is pickled as always. `pickle.Pickler` takes it, and so
# does a subclass of CloudPickler with a table in its class; there it replaces cloudpickle's own one. So a reducer that
# swaps weights for a reference sends the weights, and only the size tells.
#
# Run: findings/cloudpickle_reads_dispatch_table_from_the_class.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q cloudpickle==3.1.2
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import io
import pickle

from cloudpickle import CloudPickler


class Heavy:
    pass


table = {Heavy: lambda heavy: (str, ("reference",))}


def arrives(make):
    buffer = io.BytesIO()
    make(buffer).dump(Heavy())
    return type(pickle.loads(buffer.getvalue())).__name__


def on_instance(kind):
    def make(buffer):
        pickler = kind(buffer)
        pickler.dispatch_table = table
        return pickler

    return make


seen = {
    "pickle, on the instance": arrives(on_instance(pickle.Pickler)),
    "cloudpickle, on the instance": arrives(on_instance(CloudPickler)),
    "cloudpickle, in a subclass": arrives(type("Own", (CloudPickler,), {"dispatch_table": table})),
}
for what, kind in seen.items():
    print(f"{what}: {'the reference' if kind == 'str' else 'the object itself'}")
assert list(seen.values()) == ["str", "Heavy", "str"], seen
PYTHON

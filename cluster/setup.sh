#!/usr/bin/env bash
# Make this machine ready to be a node: a virtual environment with the pinned releases and this checkout, and shells
# that find it. Every node runs it; where all of that is in place already, it needs no network and changes nothing.
#
#   bash cluster/setup.sh [PYTHON]      # PYTHON: e.g. 3.11, the driver's version; RAYTRAINER_VENV: another place
set -euo pipefail

python=${1:-3.11}
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${RAYTRAINER_VENV:-$HOME/.venvs/raytrainer}

complete() { # whether the environment has this Python, the pinned releases and raytrainer
    [ -x "$venv/bin/python" ] || return 1
    (cd / && "$venv/bin/python" - "$python" "$repo/.ci/constraints.txt") <<'EOF'
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version

wanted, constraints = sys.argv[1:]
with open(constraints) as lines:
    pins = dict(line.strip().split("==") for line in lines if "==" in line)
have = ".".join(map(str, sys.version_info[:3]))
missing = [] if (have + ".").startswith(wanted + ".") else [f"Python {wanted} (has {have})"]
for name in ("ray", "torch", "pyarrow", "grpcio"):
    try:
        found = version(name).split("+")[0]  # torch's release may end in +cpu or +cu130
    except PackageNotFoundError:
        found = "none"
    if found != pins[name]:
        missing.append(f"{name}=={pins[name]} (has {found})")
if importlib.util.find_spec("raytrainer") is None:
    missing.append("raytrainer")
if missing:
    sys.exit("to be installed: " + ", ".join(missing))
EOF
}

make_venv() {
    # Debian and Ubuntu may have a python3.X without the part that makes environments
    if "python$python" -c 'import ensurepip, venv' 2>/dev/null; then
        "python$python" -m venv "$venv"
        return
    fi
    # a fixed uv fetches a fixed Python: Ray refuses nodes whose versions differ even in the last number
    curl -LsSf https://astral.sh/uv/0.9.5/install.sh | env UV_UNMANAGED_INSTALL="$HOME/.local/uv" sh
    "$HOME/.local/uv/uv" venv --seed --python "$python" "$venv"
}

if ! complete; then
    [ -x "$venv/bin/python" ] || make_venv
    "$venv/bin/python" -c 'import sys; sys.exit(not sys.version.startswith(sys.argv[1] + "."))' "$python" ||
        { echo "$venv has another Python: remove it, or say which one to use" >&2 && exit 1; }
    "$venv/bin/python" -m pip install -q -c "$repo/.ci/constraints.txt" -e "$repo[cluster,examples]"
    complete
fi

# Shells find the environment, and Ray's commands use the token in ~/.ray/auth_token.
cat >"$HOME/.raytrainer.sh" <<EOF
export PATH="$venv/bin:\$PATH" RAY_AUTH_MODE=token
EOF
# the first line: on Debian, what follows is skipped in shells that are not interactive
hook='. ~/.raytrainer.sh'
touch "$HOME/.bashrc"
if ! grep -qxF "$hook" "$HOME/.bashrc"; then
    printf '%s\n' "$hook" | cat - "$HOME/.bashrc" >"$HOME/.bashrc.new"
    cat "$HOME/.bashrc.new" >"$HOME/.bashrc" && rm "$HOME/.bashrc.new"
fi

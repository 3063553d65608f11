"""The files in `cluster/`: every key of them is one that Ray, EC2, Compute Engine or Kubernetes reads.

Nothing is started and nothing asked: the checks are Ray's own where it has them, EC2's as botocore ships them, and
schemas of what is used otherwise.
"""

from __future__ import annotations

import copy
import json
import mmap
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import ray
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator
from cluster_schemas import INSTANCE, PROVIDERS, RAY_CLUSTER, RAY_JOB, RESOURCES, of_kind
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
LAUNCHED = ("local", "aws", "gcp")

# Ray's commands import parts of it that pydantic warns about
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Path_ = tuple[str | int, ...]


@cache
def text(name: str) -> str:
    return json.dumps(yaml.safe_load((CLUSTER / f"{name}.yaml").read_text()))


def load(name: str) -> Any:
    """A file's content. Nothing in it is shared: not with other calls, and not between node types."""
    return json.loads(text(name))


def fits(value: Any, schema: Any) -> None:
    jsonschema.Draft202012Validator(schema).validate(value)


# ---------------------------------------------------------------- checks


@cache
def run_instances() -> Any:
    return get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def check_enums(value: Any, shape: Any) -> None:
    """Values that EC2 lists; botocore leaves them to the server."""
    if shape.type_name == "structure":
        for key, part in value.items():
            check_enums(part, shape.members[key])
    elif shape.type_name == "list":
        for part in value:
            check_enums(part, shape.member)
    elif getattr(shape, "enum", None):
        assert value in shape.enum, f"{value}: not a {shape.name}"


def check_ec2(node_config: Any) -> None:
    request = {**node_config, "MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(request, run_instances())
    assert not report.has_errors(), report.generate_report()
    check_enums(request, run_instances())
    assert {"InstanceType", "ImageId", "BlockDeviceMappings"} <= set(node_config)
    assert re.fullmatch("ami-[0-9a-f]{17}", node_config["ImageId"])


@cache
def check_bash(command: str) -> None:
    found = subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0 and not found.stderr, found.stderr


@cache
def ray_reads(setting: str) -> bool:
    """Whether one of Ray's binaries knows a setting, which RAY_<setting> in the environment would change."""
    for binary in ("gcs/gcs_server", "raylet/raylet"):
        with (
            open(Path(ray.__file__).parent / "core/src/ray" / binary, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            if content.find(setting.encode() + b"\0") >= 0:
                return True
    return False


def check_variable(name: str) -> None:
    assert name != "RAY_AUTH_TOKEN", "a secret is never written down"
    assert name == "RAY_AUTH_MODE" or ray_reads(name.removeprefix("RAY_")), f"{name}: Ray does not read it"


def check_ray_start(arguments: list[str]) -> dict[str, Any]:
    """What `ray start` makes of its command line, without doing it."""
    from ray.scripts.scripts import start

    given = [argument.replace("$RAY_HEAD_IP", "10.0.0.1") for argument in arguments]
    return dict(start.make_context("start", given).params)


@cache
def check_command(command: str) -> None:
    check_bash(command)
    for part in command.split(";"):
        words = shlex.split(part)
        if words[:1] == ["export"]:
            for word in words[1:]:
                check_variable(word.partition("=")[0])
        if words[:2] == ["ray", "start"]:
            check_ray_start(words[2:])
    for path in re.findall(r"~/raytrainer/([\w./-]+)", command):
        assert (ROOT / path).is_file(), f"{path}: no such file"


def check_launcher(config: Any) -> None:
    """A file for `ray up`."""
    given = copy.deepcopy(config)
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    provider = given["provider"]["type"]
    fits(given["provider"], PROVIDERS[provider])
    assert "ssh_user" in given["auth"], "Ray needs it, whatever its schema says"
    for name, kind in given.get("available_node_types", {}).items():
        fits(kind["resources"], RESOURCES)
        assert name == given["head_node_type"] or {"min_workers", "max_workers"} <= set(kind)
        assert kind.get("max_workers", 0) <= given["max_workers"]
        if provider == "gcp":
            assert name == given["head_node_type"] or kind["resources"].get("GPU")
            fits(kind["node_config"], INSTANCE)
        else:
            check_ec2(kind["node_config"])
    token = "~/.ray/auth_token"
    for there, here in given["file_mounts"].items():
        assert there == here == token or (there == f"~/raytrainer/{here}" and (ROOT / here).exists()), there
    assert token in given["file_mounts"]
    commands = [command for key, value in given.items() if key.endswith("_commands") for command in value]
    for command in commands:
        check_command(command)
    # what the defaults of these would do is not what is meant
    needed = {"initialization_commands", "setup_commands", "head_start_ray_commands", "worker_start_ray_commands"}
    assert {*needed, "rsync_exclude"} <= set(given)
    assert provider == "local" or {"max_workers", "upscaling_speed", "idle_timeout_minutes"} <= set(given)


def check_ray_cluster(document: Any) -> None:
    fits(document, of_kind("RayCluster", RAY_CLUSTER))
    spec = document["spec"]
    derived = _derive_autoscaling_config_from_ray_cr(document)["available_node_types"]
    assert derived["headgroup"]["resources"]["CPU"] == 0, "training workers would go to the head"
    assert derived[spec["workerGroupSpecs"][0]["groupName"]]["resources"]["GPU"] > 0
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        for variable in container["env"]:
            check_variable(variable["name"])
        volumes = {volume["name"] for volume in group["template"]["spec"].get("volumes", [])}
        mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])}
        assert set(mounts) == volumes
        assert group is spec["headGroupSpec"] or "/dev/shm" in mounts.values()
        parameters = group["rayStartParams"]
        check_ray_start([f"--{name}={value}" for name, value in parameters.items()])


def check_ray_job(document: Any) -> None:
    fits(document, of_kind("RayJob", RAY_JOB))
    cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": document["metadata"]}
    check_ray_cluster({**cluster, "spec": document["spec"]["rayClusterSpec"]})
    check_bash(document["spec"]["entrypoint"])


CHECKS: dict[str, Callable[[Any], None]] = {
    **dict.fromkeys(LAUNCHED, check_launcher),
    "kuberay": check_ray_cluster,
    "rayjob": check_ray_job,
}
#: What a check raises. SystemExit and click's are Ray's ways to refuse.
REFUSED = (
    AssertionError, KeyError, NotImplementedError, SystemExit, ValueError,
    click.ClickException, jsonschema.ValidationError,
)  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_files_are_valid(name: str) -> None:
    CHECKS[name](load(name))


# ---------------------------------------------------------------- the checks see typing errors


def keys(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The path of every key in a document."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield (*path, key)
            yield from keys(part, (*path, key))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from keys(part, (*path, i))


def parent(document: Any, path: Path_) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document


def free_name(path: Path_) -> bool:
    """Names that one may choose."""
    return path[:1] == ("available_node_types",) and len(path) == 2 and path[1] != "head"


@pytest.mark.parametrize("name", CHECKS)
def test_a_typing_error_in_any_key_is_seen(name: str) -> None:
    paths = [path for path in keys(load(name)) if not free_name(path)]
    assert max(map(len, paths)) >= (2 if name == "local" else 5)
    for path in paths:
        document = load(name)
        holder = parent(document, path)
        holder[f"{path[-1]}x"] = holder.pop(path[-1])
        with pytest.raises(REFUSED):
            CHECKS[name](document)
            pytest.fail(f"{'.'.join(map(str, path))} + x passes")


BAD_VALUES: list[tuple[str, Path_, Any]] = [
    ("local", ("provider", "type"), "locale"),
    ("local", ("provider", "head_ip"), "10.0.0"),
    ("local", ("setup_commands", 0), "bash ~/raytrainer/cluster/setupp.sh 3.11"),
    ("local", ("initialization_commands", 0), "chmod 700 ~/.ray && (chmod 600 ~/.ray/auth_token"),
    ("local", ("head_start_ray_commands", 1), "ray start --head --prot=6379"),
    ("local", ("head_start_ray_commands", 1), "ray start --head --port=many"),
    ("local", ("worker_start_ray_commands", 1), "export RAY_worker_nicenes=0; ray start"),
    ("local", ("file_mounts", "~/raytrainer/cluster"), "clusters"),
    ("aws", ("max_workers",), "4"),
    ("aws", ("max_workers",), 3),
    ("aws", ("head_node_type",), "haed"),
    ("aws", ("provider", "cache_stopped_nodes"), True),
    ("aws", ("available_node_types", "gpu", "node_config", "InstanceType"), "g6.5xlarge"),
    ("aws", ("available_node_types", "gpu", "node_config", "BlockDeviceMappings", 0, "Ebs", "VolumeSize"), "200"),
    ("aws", ("available_node_types", "gpu_spot", "node_config", "InstanceMarketOptions", "MarketType"), "spott"),
    ("gcp", ("available_node_types", "gpu", "node_config", "disks", 0, "type"), "PERSISTANT"),
    ("gcp", ("available_node_types", "gpu", "node_config", "scheduling", "onHostMaintenance"), "STOP"),
    ("gcp", ("available_node_types", "gpu", "node_config", "scheduling"), [{"onHostMaintenance": "TERMINATE"}]),
    ("kuberay", ("spec", "authOptions", "mode"), "tokn"),
    ("kuberay", ("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
    ("kuberay", ("spec", "workerGroupSpecs", 0, "template", "spec", "volumes", 0, "emptyDir", "medium"), "Memry"),
    ("kuberay", ("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "volumeMounts", 0, "name"), "x"),
    ("kuberay", ("spec", "headGroupSpec", "template", "spec", "containers", 0, "env", 0, "name"), "RAY_AUTH_TOKEN"),
    ("rayjob", ("spec", "submissionMode"), "K8sJob"),
    ("rayjob", ("spec", "shutdownAfterJobFinishes"), False),
    ("rayjob", ("kind",), "RayJobs"),
]


@pytest.mark.parametrize(("name", "path", "value"), BAD_VALUES)
def test_a_wrong_value_is_seen(name: str, path: Path_, value: Any) -> None:
    document = load(name)
    holder = parent(document, path)
    assert holder[path[-1]] != value
    holder[path[-1]] = value
    with pytest.raises(REFUSED):
        CHECKS[name](document)

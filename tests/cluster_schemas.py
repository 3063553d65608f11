"""What the files in `cluster/` may say, where neither Ray nor botocore has a list of it."""

from __future__ import annotations

from typing import Any


def has(*required: str, **properties: Any) -> dict[str, Any]:
    """Schema of a mapping with these keys and no others."""
    assert set(required) <= set(properties)
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def each(schema: Any) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": 1}


TEXT, WHOLE, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
ADDRESS = {"type": "string", "pattern": r"^\d+(\.\d+){3}$"}

#: What Ray's providers read of `provider`; Ray's schema lets anything through there.
PROVIDERS = {
    "local": has("type", "head_ip", "worker_ips", type=TEXT, head_ip=ADDRESS, worker_ips=each(ADDRESS)),
    "aws": has(
        "type", "region", "availability_zone", "cache_stopped_nodes",
        type=TEXT, region=TEXT, availability_zone=TEXT, cache_stopped_nodes={"const": False},
    ),
    "gcp": has(
        "type", "region", "availability_zone", "project_id", "cache_stopped_nodes",
        type=TEXT, region=TEXT, availability_zone=TEXT, project_id=TEXT, cache_stopped_nodes={"const": False},
    ),
}  # fmt: skip
RESOURCES = has(CPU=WHOLE, GPU=WHOLE)

#: A part of Compute Engine's `Instance`. The whole is in the discovery document of google-api-python-client, which
#: unpacks to more than 100 MB: too much for the sake of these lines. Names and values are those of its API v1.
INSTANCE = has(
    "machineType", "disks",
    machineType=TEXT,
    disks=each(
        has(
            "boot", "autoDelete", "initializeParams",
            boot=FLAG,
            autoDelete={"const": True},  # a disk that outlives its machine costs money
            type={"enum": ["PERSISTENT", "SCRATCH"]},
            initializeParams=has("diskSizeGb", "sourceImage", diskSizeGb=WHOLE, sourceImage=TEXT, diskType=TEXT),
        )
    ),
    scheduling=has(
        "onHostMaintenance",
        automaticRestart=FLAG,
        onHostMaintenance={"enum": ["MIGRATE", "TERMINATE"]},
        provisioningModel={"enum": ["SPOT", "STANDARD"]},
        instanceTerminationAction={"enum": ["DELETE", "STOP"]},
    ),
)  # fmt: skip

#: Parts of a RayCluster, of a RayJob (ray.io/v1), and of the pods in them (core/v1).
QUANTITIES = {
    "type": "object",
    "patternProperties": {r"^(cpu|memory|nvidia\.com/gpu)$": {"type": "string", "pattern": r"^\d+(Mi|Gi)?$"}},
    "required": ["cpu", "memory"],
    "additionalProperties": False,
}
CONTAINER = has(
    "name", "image", "resources",
    name=TEXT,
    image=TEXT,
    env=each(has("name", "value", name={"type": "string", "pattern": "^RAY_"}, value=TEXT)),
    ports=each(has("name", "containerPort", name=TEXT, containerPort=WHOLE)),
    resources=has("requests", "limits", requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=each(has("name", "mountPath", name=TEXT, mountPath=TEXT)),
)  # fmt: skip
SHM = has("medium", "sizeLimit", medium={"const": "Memory"}, sizeLimit={"type": "string", "pattern": r"^\d+Gi$"})
VOLUME = has("name", "emptyDir", name=TEXT, emptyDir=SHM)
POD = has("spec", spec=has("containers", containers=each(CONTAINER), volumes=each(VOLUME)))
GROUP = {
    "rayStartParams": {"type": "object", "additionalProperties": TEXT},  # numbers would be refused
    "template": POD,
}
RAY_CLUSTER = has(
    "rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling",
    rayVersion=TEXT,
    authOptions=has("mode", mode={"const": "token"}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=has(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=WHOLE,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    ),
    headGroupSpec=has("rayStartParams", "template", **GROUP),
    workerGroupSpecs=each(
        has(
            "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template",
            groupName=TEXT, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, **GROUP,
        )
    ),
)  # fmt: skip
RAY_JOB = has(
    "entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec",
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
    backoffLimit=WHOLE,
    shutdownAfterJobFinishes={"const": True},
    ttlSecondsAfterFinished=WHOLE,
    activeDeadlineSeconds=WHOLE,
    rayClusterSpec=RAY_CLUSTER,
)  # fmt: skip


def of_kind(kind: str, spec: Any) -> dict[str, Any]:
    metadata = has("name", "namespace", name=TEXT, namespace=TEXT)
    names = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}}
    return has("apiVersion", "kind", "metadata", "spec", **names, metadata=metadata, spec=spec)

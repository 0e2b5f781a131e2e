"""The JobSet of a step on several nodes: what it is made of, and what it and its pods say of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kubernetes.client import V1Pod

GROUP, VERSION, PLURAL = "jobset.x-k8s.io", "v1alpha2", "jobsets"
NODE = "node"
"""The set's only job; its pods are called NAME-node-0-RANK and some letters."""
PORT = 29400
INDEX = "batch.kubernetes.io/job-completion-index"
"""The annotation by which an indexed job tells its pods which one they are."""
KEEP_SECONDS = 86_400
"""A set that nobody deleted - Airflow was gone - deletes itself so long after its end."""


def jobset(name: str, pod: Mapping[str, Any], nodes: int) -> dict[str, Any]:
    """`nodes` times this pod, as one set that starts, ends and waits in the queue together."""
    spec, labels = dict(pod["spec"]), {**pod["metadata"]["labels"], "hllm/nodes": "true"}
    (container,) = spec["containers"]
    told = {
        "PET_NNODES": str(nodes),
        "PET_MASTER_ADDR": f"{name}-{NODE}-0-0.{name}",
        "PET_MASTER_PORT": str(PORT),
    }
    # JOB_COMPLETION_INDEX says the same, but the job's controller puts it last: "$(...)" would stay as it is.
    rank = {"valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}}
    variables = [
        *({"name": key, "value": value} for key, value in told.items()),
        {"name": "PET_NODE_RANK", **rank},
    ]
    spec["containers"] = [{**container, "env": [*container.get("env", ()), *variables]}]
    spec["restartPolicy"] = "Never"
    own = {key: value for key, value in labels.items() if not key.startswith("kueue.x-k8s.io/")}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "JobSet",
        # Kueue admits the set, not its pods one by one.
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "failurePolicy": {"maxRestarts": 0},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "ttlSecondsAfterFinished": KEEP_SECONDS,
            "replicatedJobs": [
                {
                    "name": NODE,
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "completionMode": "Indexed",
                            "completions": nodes,
                            "parallelism": nodes,
                            "backoffLimit": 0,
                            "template": {
                                "metadata": {"labels": own},
                                "spec": spec,
                            },
                        }
                    },
                }
            ],
        },
    }


def pods_of(*names: str) -> str:
    """The label selector of these sets' pods."""
    return f"jobset.sigs.k8s.io/jobset-name in ({','.join(names)})"


def rank_of(pod: V1Pod) -> str:
    """Which of the set it is."""
    return (pod.metadata.annotations or {}).get(INDEX, "")


def why_failed(found: Mapping[str, Any]) -> str:
    """What the set says of its failure; nothing, while it has not failed."""
    for condition in found.get("status", {}).get("conditions", ()):
        if (condition["type"], condition["status"]) == ("Failed", "True"):
            return condition.get("message") or condition.get("reason") or "it does not say why"
    return ""

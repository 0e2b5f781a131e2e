"""What JobSet's controller and indexed jobs would make of a set, for clusters that have neither: its pods.

Names, labels, annotations and variables are those that they document. A cluster without DNS is helped out by
entries in /etc/hosts.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.cluster.world import Namespace, wait_until
from tests.k8s.world import kubectl

INDEX = "batch.kubernetes.io/job-completion-index"
STAND_IN = "hllm/stand-in"
DEFINITION: dict[str, Any] = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "jobsets.jobset.x-k8s.io", "labels": {STAND_IN: "true"}},
    "spec": {
        "group": "jobset.x-k8s.io",
        "names": {"kind": "JobSet", "listKind": "JobSetList", "plural": "jobsets", "singular": "jobset"},
        "scope": "Namespaced",
        "versions": [
            {
                "name": "v1alpha2",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
                },
            }
        ],
    },
}


def defined() -> bool:
    """Let the cluster know JobSets; whether it is ours to do what their controller does."""
    name = DEFINITION["metadata"]["name"]
    there = kubectl("get", "crd", name, "--ignore-not-found", "-o", "json")
    if there.strip():
        return STAND_IN in json.loads(there)["metadata"].get("labels", {})
    kubectl("apply", "-f", "-", stdin=json.dumps(DEFINITION))
    kubectl("wait", "--for=condition=Established", f"crd/{name}", "--timeout=30s")
    return True


@contextmanager
def controlled(place: Namespace) -> Iterator[None]:
    """JobSets of this namespace become pods, and pods go with their JobSet, until the end of the block; by
    their own controller, where the cluster has it."""
    if not defined():
        yield
        return
    over, made = threading.Event(), set()

    def control() -> None:
        while not over.wait(1.0):
            for jobset in json.loads(place.kubectl("get", "jobsets", "-o", "json"))["items"]:
                if jobset["metadata"]["uid"] not in made:
                    made.add(jobset["metadata"]["uid"])
                    make_pods(place, jobset)

    thread = threading.Thread(target=control, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(30)


def make_pods(place: Namespace, jobset: dict[str, Any]) -> None:
    name = jobset["metadata"]["name"]
    (job,) = jobset["spec"]["replicatedJobs"]
    template, count = job["template"]["spec"]["template"], job["template"]["spec"]["completions"]
    first = f"{name}-{job['name']}-0-0"
    address = "127.0.0.1"
    for index in range(count):
        pod = copy.deepcopy(template)
        pod |= {"apiVersion": "v1", "kind": "Pod"}
        pod["metadata"] |= {"name": f"{name}-{job['name']}-0-{index}", "annotations": {INDEX: str(index)}}
        pod["metadata"]["labels"]["jobset.sigs.k8s.io/jobset-name"] = name
        owner = {"apiVersion": jobset["apiVersion"], "kind": "JobSet", "name": name, "controller": True}
        pod["metadata"]["ownerReferences"] = [{**owner, "uid": jobset["metadata"]["uid"]}]
        pod["spec"] |= {"hostname": pod["metadata"]["name"], "subdomain": name}
        pod["spec"]["hostAliases"] = [{"ip": address, "hostnames": [f"{first}.{name}"]}]
        (container,) = pod["spec"]["containers"]
        container["env"].append({"name": "JOB_COMPLETION_INDEX", "value": str(index)})  # last, as jobs do
        place.apply(pod)
        if index == 0:
            address = wait_until(
                "the first pod's address",
                lambda: place.kubectl("get", "pod", first, "-o", "jsonpath={.status.podIP}"),
            )

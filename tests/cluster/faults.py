"""What goes wrong in the cluster: one DAG of one step each (tests/cluster/dags/faults.py)."""

from __future__ import annotations

from typing import Any

LONG = {"HLLM__HLLM__STAGE1__STEPS": "60", "HLLM__HLLM__STAGE1__CHECKPOINT_MINUTES": "0.00001"}
"""A checkpoint after every step: a training that is met half-way, on any machine."""
ENDLESS = {**LONG, "HLLM__HLLM__STAGE1__STEPS": "5000"}
"""One that must not be ready before the cluster has noticed; a kubelet looks at disks once a minute."""

ANOTHERS = "ANOTHERS-CERTIFICATE"
"""Stands for the endpoint of an S3 server whose certificate is for another name."""


def fault(step: str, environment: dict[str, str] | None = None, **sets: Any) -> dict[str, Any]:
    """`step` in a pod, with settings of the runner that differ (`runner__pod__memory="1Gi"`)."""
    dotted = {name.replace("__", "."): value for name, value in {"runner__retries": 0, **sets}.items()}
    return {"step": step, "environment": environment or {}, "sets": dotted}


def elsewhere(name: str, **environment: str) -> dict[str, str]:
    """Outputs of its own, so that nothing is reused."""
    return {"HLLM__RUN__ROOT": f"s3://hllm/{name}", **environment}


FAULTS: dict[str, dict[str, Any]] = {
    "killed": fault("train-hllm-1", LONG, runner__retries=2),
    "deleted": fault("train-hllm-1", {**LONG, "HLLM__RUN__SEED": "2"}, runner__retries=2),
    "failed": fault("train-hllm-1", {**LONG, "HLLM__RUN__SEED": "3"}),
    "restarted": fault("train-hllm-1", {**LONG, "HLLM__RUN__SEED": "4"}),
    "memory": fault("ingest", elsewhere("memory"), runner__pod__memory="48Mi"),
    "gpus": fault("ingest", elsewhere("gpus"), runner__pod__gpus=9, runner__queue_hours=0.01),
    "image": fault("ingest", elsewhere("image"), runner__pod__image="localhost/no-such-image:1"),
    "queue": fault("ingest", elsewhere("queue"), runner__pod__queue="no-such-queue"),
    # A server that does not answer in time on a busy machine is another fault, and tried again.
    "bucket": fault("ingest", {"HLLM__RUN__ROOT": "s3://no-such-bucket/runs"}, runner__retries=2),
    "credentials": fault(
        "ingest", elsewhere("credentials", AWS_SECRET_ACCESS_KEY="wrong"), runner__retries=2
    ),
    "certificate": fault(
        "ingest",
        elsewhere("certificate", AWS_ENDPOINT_URL_S3=ANOTHERS, AWS_CA_BUNDLE="/etc/hllm/certificate.pem"),
        runner__retries=2,
    ),
    "disk": fault("train-hllm-1", {**ENDLESS, "HLLM__RUN__SEED": "6"}, runner__pod__disk="1Mi"),
    "nodes": fault(
        "train-hllm-1",
        {"HLLM__RUN__SEED": "5", "HLLM__HLLM__STAGE1__STEPS": "20"},
        **{"runner.steps.train-hllm-1.nodes": 2},
    ),
    "lost": fault(
        "train-hllm-1",
        {**LONG, "HLLM__RUN__SEED": "7"},
        runner__retries=2,
        **{"runner.steps.train-hllm-1.nodes": 2},
    ),
    "cancelled": fault(
        "train-hllm-1",
        {**ENDLESS, "HLLM__RUN__SEED": "8"},
        **{"runner.steps.train-hllm-1.nodes": 2},
    ),
    "rights": fault("ingest", elsewhere("rights")),
}

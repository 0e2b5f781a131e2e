"""How Airflow starts a step, and what it costs: a process or a pod."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hllm.settings.section import Section

QUANTITY = r"^([0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?)?$"


class Pod(Section):
    image: str = Field("hllm:0.1.0", min_length=1)
    """Container image with `hllm` in it; pin what you built by `@sha256:...`."""
    cpu: str = Field("2", pattern=QUANTITY, min_length=1)
    """Cores that are kept free for the step, as Kubernetes writes them (`2`, `500m`)."""
    cpu_limit: str = Field("4", pattern=QUANTITY)
    """Cores it may use when nobody else wants them; empty: as many as the node has (a namespace with a quota
    on limits refuses that)."""
    memory: str = Field("8Gi", pattern=QUANTITY, min_length=1)
    """Memory, asked for and limit at once (`8Gi`): a step that needs more is killed, and its task says so."""
    disk: str = Field("20Gi", pattern=QUANTITY)
    """Room on the node's disk under /work and /tmp, asked for and limit at once; empty: whatever there is."""
    gpus: int = Field(0, ge=0)
    """How many `nvidia.com/gpu`. With any, /dev/shm is memory, and nodes with the taint of that name are
    tolerated (with a `template`, that says what is)."""
    nodes: int = Field(1, ge=1)
    """Pods that work together on one step (`train`, `embed` or `evaluate`), each with all of the above: a
    JobSet, which the cluster must know."""
    queue: str = ""
    """Kueue's LocalQueue that admits the pod; empty: no queue."""
    template: str = ""
    """YAML file (kind Pod) with what else this cluster wants: tolerations, node affinity, more volumes. Where
    both say something, the rest of this section wins. Airflow's workers read it."""


class Runner(Section):
    kind: Literal["local", "kubernetes"] = "local"
    """How Airflow starts a step: `local`, a process on the machine of its worker, or `kubernetes`, a pod."""
    parallel_steps: int = Field(1, ge=1)
    """Steps of one pipeline that may run at the same time; each uses `run.threads`."""
    retries: int = Field(1, ge=0)
    """Retries of a step that failed with InfraError (75) or was terminated."""
    namespace: str = Field("hllm", min_length=1)
    """Kubernetes namespace of the steps' pods."""
    pod: Pod = Pod()
    """What the pod of every step asks for."""
    steps: dict[str, Pod] = Field({})
    """Where one step's pod differs, by the name of its task (`[runner.steps.train-hllm-1]`, `gpus = 1`); what
    is left out is as in `runner.pod`."""
    queue_hours: float = Field(24.0, gt=0)
    """How long a pod may wait for room (a GPU, its turn in the queue) before its task fails."""
    start_minutes: float = Field(20.0, gt=0)
    """How long a pod that has its node may take to start, pulling its image included; and how long machines
    that share a step wait for each other."""
    grace_seconds: int = Field(300, ge=1)
    """Seconds from SIGTERM to SIGKILL: time for one unit of work and a checkpoint."""
    log_seconds: int = Field(15, ge=1)
    """Seconds between looks at a pod's output, which then appears in the task's log."""

    def pod_of(self, step: str) -> Pod:
        """What the pod of one step asks for: `pod`, except for what `steps` says of it."""
        own = self.steps.get(step)
        return self.pod.model_copy(update=own.model_dump(exclude_unset=True)) if own else self.pod


class Report(Section):
    price_per_hour: float = Field(0.10, ge=0)
    """What an hour of a machine costs, for the cost of each step on all of its machines (0.10 is about two
    cloud CPU cores); 0 leaves it out."""
    price_per_gpu_hour: float = Field(0.0, ge=0)
    """What an hour of one GPU costs, on top of `price_per_hour`, from when a step has it until it gives it
    back."""
    currency: str = "USD"
    """Currency of both prices."""

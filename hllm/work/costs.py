"""What a step takes - time, processors, GPUs, memory - and what that costs by the prices in the settings."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping

from hllm.settings import Report, Settings
from hllm.work.artifacts import Manifest, Store

CPU, GPU, MEMORY, MACHINES = "cpu_seconds", "gpu_seconds", "peak_memory_mb", "machine_seconds"


class Meter:
    """Measures this process and its children from here on."""

    def __init__(self) -> None:
        self._started, self._cpu = time.monotonic(), _cpu_seconds()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._started, 3)

    def usage(self) -> dict[str, float]:
        """Processor seconds and the most memory held so far (MB), both of this process and its children
        alone; seconds times GPUs held (used or not) and times machines, both of all that work together."""
        peak = max(resource.getrusage(who).ru_maxrss for who in _ALL)
        return {
            CPU: round(_cpu_seconds() - self._cpu, 3),
            GPU: round(self.seconds * gpus_held(), 3),
            MEMORY: peak // 1024,
            MACHINES: round(self.seconds * machines(), 3),
        }


_ALL = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def _cpu_seconds() -> float:
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, _ALL))


def gpus_held(environ: Mapping[str, str] = os.environ) -> int:
    """GPUs that nobody else can use meanwhile: those that a cluster gave to this container, else those that
    PyTorch sees where it is in use; of all machines together."""
    given = environ.get("NVIDIA_VISIBLE_DEVICES", "")
    if given not in ("", "all", "none", "void"):
        count = len(given.split(","))
    else:
        torch = sys.modules.get("torch")
        count = torch.cuda.device_count() if torch and torch.cuda.is_available() else 0
    return count * machines(environ)


def machines(environ: Mapping[str, str] = os.environ) -> int:
    """How many `torchrun` has started this step on. (By itself WORLD_SIZE may be of whoever calls `hllm`.)"""
    if "LOCAL_WORLD_SIZE" not in environ:
        return 1
    return max(1, int(environ["WORLD_SIZE"]) // int(environ["LOCAL_WORLD_SIZE"]))


def price(report: Report, machine_seconds: float, gpu_seconds: float) -> float:
    """In `report.currency`."""
    return (machine_seconds * report.price_per_hour + gpu_seconds * report.price_per_gpu_hour) / 3600


def cost(report: Report, manifest: Manifest) -> float:
    """Of one step, in `report.currency`."""
    return price(report, _machine_seconds(manifest), manifest.usage.get(GPU, 0.0))


def _machine_seconds(manifest: Manifest) -> float:
    return manifest.usage.get(MACHINES, manifest.seconds)  # older manifests: of one machine


def total(report: Report, manifests: Iterable[Manifest]) -> dict[str, float]:
    """Of some steps: `seconds`, `gpu_seconds`, `cost`; `cpu_seconds` and the highest `peak_memory_mb`, where
    several processes worked together, of the first."""
    found = list(manifests)
    summed = {name: sum(manifest.usage.get(name, 0.0) for manifest in found) for name in (CPU, GPU)}
    seconds = sum(manifest.seconds for manifest in found)
    return {
        "seconds": seconds,
        **summed,
        MEMORY: max((manifest.usage.get(MEMORY, 0.0) for manifest in found), default=0.0),
        "cost": sum(cost(report, manifest) for manifest in found),
    }


def estimate(settings: Settings, store: Store, step: str) -> tuple[float, float, float] | None:
    """(seconds, machine seconds, GPU seconds) that a step may take: as its newest earlier run, whatever that
    read; a training by its number of steps, where the settings say it. None: it has never run here."""
    earlier = store.finished(step)
    if not earlier:
        return None
    last, share = earlier[-1], 1.0
    if step.startswith("train-") and last.rows.get("steps"):
        family, _, stage = step.removeprefix("train-").rpartition("-")
        wanted = settings.at(f"{family}.stage{stage}").steps
        share = wanted / last.rows["steps"] if wanted else 1.0
    return last.seconds * share, _machine_seconds(last) * share, last.usage.get(GPU, 0.0) * share

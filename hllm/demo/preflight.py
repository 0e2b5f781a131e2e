"""What must be there before anything is started, said before minutes are spent."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from hllm.errors import InfraError
from hllm.settings import Settings

DISK_GB = 2.0
MEMORY_GB = 3.0


def preflight(settings: Settings, home: Path) -> str:
    """One line about the machine.

    Raises:
        InfraError: too little memory or disk, or a package is missing.
    """
    for package in ("apache-airflow", "mlflow", "feast", "torch"):
        try:
            version(package)
        except PackageNotFoundError:
            raise InfraError(
                f"{package} is not installed", remedy="`make setup` installs every pinned package."
            ) from None
    home.mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(home).free / 2**30
    memory = psutil.virtual_memory().available / 2**30
    if disk < DISK_GB:
        raise InfraError(f"{disk:.1f} GB of disk are free; the demo needs {DISK_GB:g}", where=home)
    if memory < MEMORY_GB:
        raise InfraError(f"{memory:.1f} GB of memory are free; the demo needs {MEMORY_GB:g}")
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {memory:.1f} GB of memory and {disk:.0f} GB of disk free"

"""What a run is called, where it writes, and what of the machine it may use."""

from __future__ import annotations

from pydantic import Field

from hllm.settings.location import Folder
from hllm.settings.section import Section


class Run(Section):
    name: str = "default"
    """Names the pipeline: the MLflow experiment, and the runs that volume and freshness are compared with."""
    root: Folder = "runs/default"
    """Where every step writes: a folder or `s3://bucket/prefix`."""
    seed: int = Field(17, ge=0, lt=2**32)
    """Seeds weights, batches, negatives and bootstrap samples."""
    threads: int = Field(0, ge=0)
    """CPU threads for PyTorch and DuckDB, in each process; 0 means every core."""
    processes: int = Field(0, ge=0)
    """Processes of `train`, `embed` and `evaluate` on each machine; 0 means one for each GPU, or one."""

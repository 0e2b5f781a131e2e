"""Which model families are trained, and which of them is registered."""

from __future__ import annotations

from pydantic import Field

from hllm.settings.section import Section


class Model(Section):
    family: str = "hllm"
    """The family that is registered and published."""
    stages: int = Field(0, ge=0)
    """How many of the family's stages are trained, its first ones; 0: all. 1 of hllm is the paper's own
    comparison: both LLMs end to end, nothing after it."""
    baselines: tuple[str, ...] = ()
    """Families that are trained beside `family`, on the same split, for comparison; the untrained ones are
    always compared."""

"""Most-popular: the items with the most training events, for everybody alike."""

from __future__ import annotations

from hllm.models.family import Family

FAMILY = Family(name="popular", title="Most popular", code="hllm.models.popular.model", mark="triangle")

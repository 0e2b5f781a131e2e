"""A section of the settings: frozen, strict about its keys, documented by the docstring under each field."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, field_validator


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_nul(cls, value: object) -> object:
        """No file, database or server takes it."""
        texts = value if isinstance(value, (list, tuple)) else (value,)
        if any(isinstance(text, str) and "\0" in text for text in texts):
            raise ValueError("holds a NUL character")
        return value

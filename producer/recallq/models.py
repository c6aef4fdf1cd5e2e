"""Pydantic models without validation, where it has been done or is not needed."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel

M = TypeVar("M", bound=BaseModel)


def made(model: type[M], /, **fields: Any) -> M:
    """A model of values that are known to be right, every field of it given.

    Pydantic's ``model_construct`` looks for defaults and aliases each time, which is the larger
    part of what a job costs its caller.
    """
    it = model.__new__(model)
    put = object.__setattr__
    put(it, "__dict__", fields)
    put(it, "__pydantic_fields_set__", set(fields))
    put(it, "__pydantic_extra__", {} if model.model_config.get("extra") == "allow" else None)
    put(it, "__pydantic_private__", None)
    return it

"""A sampler of traces whose rate can be changed: a process has one provider, for good."""

from __future__ import annotations

from typing import Any

from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, SamplingResult, TraceIdRatioBased


class Sometimes(Sampler):
    """Samples so many of those calls that belong to no trace yet."""

    rate = 1.0

    def should_sample(self, *args: Any, **kwargs: Any) -> SamplingResult:
        return ParentBased(TraceIdRatioBased(self.rate)).should_sample(*args, **kwargs)

    def get_description(self) -> str:
        return "sometimes"

"""300 programs of up to 12 calls against the oracle; benchmarks/reliability.py runs 10,000."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from programs import Programs

TestPrograms = Programs.TestCase
TestPrograms.settings = settings(
    max_examples=300, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)

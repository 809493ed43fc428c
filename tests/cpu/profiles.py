"""How many examples property-based tests try, by HYPOTHESIS_PROFILE: "ci" or "long"."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
SCALE = {"ci": 1, "long": 40}[PROFILE]

# the same examples in every run of CI; others in every long run
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.register_profile(
    "long", deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
settings.load_profile(PROFILE)


def examples(count: int) -> settings:
    """`count` examples in CI, many times as many in a long run."""
    return settings(max_examples=count * SCALE, suppress_health_check=list(HealthCheck))

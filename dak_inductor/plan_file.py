"""Reading a plan that the user names."""

from __future__ import annotations

from pathlib import Path

from dak_inductor.errors import PlanError
from dak_inductor.plan import Plan


def load_plan(plan: object) -> Plan:
    """A plan, or the one in a JSON file.

    Raises PlanError, with the name of the file, for what is neither, unreadable, damaged or of
    another version.
    """
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, str | Path):
        raise PlanError(f"plan={plan!r}: a Plan, or the path of one saved as JSON")
    try:
        text = Path(plan).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PlanError(
            f"the plan file {plan} cannot be read: {reason}; `dak plan --out FILE` writes one"
        ) from error
    try:
        return Plan.from_json(text)
    except PlanError as error:
        raise PlanError(f"plan file {plan}: {error}") from error

"""What a reader of a script or manifest has to know: written into it as comments.

Only what follows from this plan is said; what holds for all of them is in docs/deploying.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from emergency_ckpt.config import advice
from emergency_ckpt.deploy.plan import Plan


def about_recovery(plan: Plan) -> Iterator[str]:
    """Restarts, exit codes, grace periods and what limits them."""
    values, grace = plan.values, plan.grace
    codes = ", ".join(map(str, plan.further_restart_codes))
    if plan.kind == "JobSet":
        yield (
            f"- Started again up to {values.max_restarts} times after the exit codes 42, 127 to 255"
            f"{f' and {codes}' if codes else ''}; after any other one the job has failed."
        )
    else:
        yield f"- Started again up to {values.max_restarts} times, after whatever exit code."
    yield (
        f"- A save at the end is planned to take {values.planned_save_seconds:g} s: the program is held for "
        f"{grace.hold_seconds} s after SIGTERM, the pod is killed after {grace.pod_seconds} s."
    )
    if plan.spot_seconds is not None and grace.hold_seconds > plan.spot_seconds:
        yield (
            f"- Pods on spot machines are gone {plan.spot_seconds} s after a notice, whatever the grace "
            "period says: a save that takes longer is not finished, and the newest complete one counts."
        )
    if not plan.config.enable_autocheckpoint:
        yield "- enable_autocheckpoint=False: nothing is saved when a pod has to go. Set it to True for that."
    for line in advice(plan.config):
        if line.isprintable():
            yield f"- {line}"

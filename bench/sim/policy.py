"""What a policy is: the core's own interface, and how to name one on the command line.

Rule: policies speak the messages of ``scheduler_svc.core``. The product's Scheduler is one as it
stands, without an adapter; the reference policies are others, in the simulator only.
"""

from dataclasses import fields, replace
from typing import Any, Protocol, cast

from bench.sim.llamacpp_ha import LlamaCppHa
from bench.sim.resident_first import ResidentFirst
from scheduler_svc.core.answers import RequestStatus
from scheduler_svc.core.domain import CoreSettings
from scheduler_svc.core.messages import Effects, Event
from scheduler_svc.core.scheduler import Scheduler

EPOCH = 1


class Policy(Protocol):
    """Decides who goes next, and where."""

    def handle(self, event: Event, now_ms: int) -> Effects:
        """Apply an event."""

    def next_deadline_ms(self) -> int | None:
        """When a Tick is due at the latest."""

    def status(self, request_id: str, now_ms: int) -> RequestStatus | None:
        """Where a request stands; None if it is not live, or the policy does not say."""


def core_settings(overrides: dict[str, str]) -> CoreSettings:
    """The product's defaults, limits that no run here reaches, and what the caller changes."""
    settings = replace(
        CoreSettings(),
        max_queued_requests=1_000_000,
        max_queued_tokens=1 << 40,
        max_queued_bytes=1 << 40,
        max_inflight=1_000_000,
        max_inflight_per_tenant=1_000_000,
        max_inflight_per_model=1_000_000,
        has_decision_log=True,
    )
    kinds = {field.name: type(getattr(settings, field.name)) for field in fields(settings)}
    unknown = sorted(overrides.keys() - kinds.keys())
    if unknown:
        raise ValueError(f"no such core setting: {', '.join(unknown)}")
    values: dict[str, Any] = {
        name: text == "true" if kinds[name] is bool else kinds[name](text)
        for name, text in overrides.items()
    }
    return replace(settings, **values)


def settings_of(name: str, overrides: dict[str, str]) -> CoreSettings | None:
    """The settings of a policy by name; None of a reference."""
    base, _, text = name.partition(":")
    changes = dict(pair.split("=", 1) for pair in text.split(";") if pair)
    if base == "headway":
        return core_settings(overrides | changes)
    if base not in REFERENCES or changes:
        raise ValueError(f"no such policy: {name}")
    return None


def make_policy(name: str, overrides: dict[str, str] | None = None) -> Policy:
    """A fresh policy: "headway", "headway:key=value;...", or one of REFERENCES."""
    settings = settings_of(name, overrides or {})
    return Scheduler(settings, EPOCH) if settings else cast("Policy", REFERENCES[name]())


REFERENCES = {
    # Part A with model_affinity_sched_bonus 0 and model_unload_delay 0: arrival order
    "fifo": lambda: LlamaCppHa(bonus=0, hold_ms=0),
    # its sample file: bonus 10, equalization 30 s, model_unload_delay 3 s
    "llamacpp-ha": lambda: LlamaCppHa(bonus=10, hold_ms=3_000),
    "resident-first": ResidentFirst,
}
POLICIES = ("headway", *REFERENCES)

"""The settings and the fleet that the bounds machine plays with, and what they promise.

Times, all in milliseconds. A disturbance (an executor comes, goes, or fails a load) starts them
anew: the promises are about a fleet that is left alone. They hold for the hybrid priority; in FIFO
order (``warm_bonus`` 0) nobody is made to wait for another model, and a model may starve.

``model_ms``: so long may a model whose requests wait go without a grant, from when the oldest of
them came, or from its last grant.

    W  until it counts as of the first band, where age decides: the largest of ``band_max_wait_ms``
    E  and until it may drain a last home: twice ``aging_equalization_ms``, because its head may
       always be somebody who just came
    R  turns of the models, one after another on one executor. A turn is D + X + 2 L: the dwell
       after a forced switch, ``load / switch_time_share``; what the leases there still need, at
       most the longest one; a load that began before for somebody else, and the load. Each other
       model may be placeless for longer, so it goes first; bands that are owed
       (``band_min_shares``) may each take one turn out of order
    S  while it shares a home: all that is older and waits for the same slots, one after another;
       each may need all slots, and so wait for what runs there before it runs itself
    X  once more for a model at its limit: that is how long its leases keep it there

``flow_ms``: the same for one band of a model. In the worst case everything older that waits for the
model goes first, one for each time that the model has its place; and with the age of each that
is passed, whoever passes it: ``locality_max_passes``, or fewer if the quantum is used up before.

``overtaken``: so many grants of its own flow may come before a request. That is who waited when it
came, and who has a right to overtake it: tenants that had less, until their virtual time has passed
the one at which it would start. What they can be behind is ``gap`` and the requests of its own
tenant before it; each grant moves them by a token / the largest weight, if all else was cached.

So every request starts within flow_ms x (overtaken + 1): each factor is checked.

``gap``: so far may the virtual times of two tenants of a flow be apart while both wait: Q + L +
2 C. Q is ``locality_quantum_tokens``, L the largest request / the smallest weight, C the same for
all that may run at once. A tenant's key rises by L at most when it is granted, and it is granted
only if it is the smallest, or Q above it. The other's key falls only by what the ends of its
requests take off, which ran at that grant: C. The second C is what they may be apart when the later
one begins to wait, since it starts at the tokens really served, without what runs (fairness.py).
After a grant the tight bound is known: Q + this request + what of the other one's ran then.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from scheduler_svc.core.domain import CoreSettings
from tests.machine.honest_fleet import LOAD_MS, MAX_TOKENS, NUM_PROMPT

# seconds of the bounds are milliseconds here, and so is everything else
LEASE_MS = 200
SETTINGS = CoreSettings(
    max_queued_requests=8,
    max_inflight=16,
    max_inflight_per_tenant=10,
    num_bands=2,
    band_min_shares=(),
    band_max_wait_ms=(300, 500),
    aging_equalization_ms=400,
    switch_time_share=0.5,
    model_hold_ms=50,
    tenant_weights={"t1": 2.0},
    locality_quantum_tokens=15,
    executor_grace_ms=100,
    max_known_models=1,
    load_backoff_ms=50,
    load_backoff_max_ms=100,
)


@dataclass(frozen=True)
class Scene:
    """What a run begins with, and the limits of what comes."""

    settings: CoreSettings = SETTINGS
    num_models: int = 3
    num_tenants: int = 3
    num_executors: int = 2
    most_slots: int = 2
    most_models: int = 2
    # the longest lease
    lease_ms: int = LEASE_MS
    load_ms: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def models(self) -> tuple[str, ...]:
        return tuple("ABCDEF"[: self.num_models])

    @cached_property
    def tenants(self) -> tuple[str, ...]:
        return tuple(f"t{number}" for number in range(self.num_tenants))

    @cached_property
    def executors(self) -> tuple[str, ...]:
        return tuple(f"e{number}" for number in range(self.num_executors))

    def weight(self, tenant: str) -> float:
        return self.settings.tenant_weights.get(tenant, 1.0)

    # --- promises -----------------------------------------------------------------------

    @cached_property
    def longest_load_ms(self) -> int:
        return max(self.load_ms.get(model, LOAD_MS) for model in self.models)

    def dwell_ms(self, model: str) -> int:
        """How long after a forced switch to this model none may follow."""
        return round(self.load_ms.get(model, LOAD_MS) / self.settings.switch_time_share)

    @cached_property
    def num_waiting(self) -> int:
        """So many wait at most: what the door lets in, and what comes back from executors."""
        return self.settings.max_queued_requests + self.num_executors * self.most_slots

    @cached_property
    def model_ms(self) -> int:
        settings, load_ms = self.settings, self.longest_load_ms
        turn_ms = round(load_ms / settings.switch_time_share) + self.lease_ms + 2 * load_ms
        return (
            max(settings.band_max_wait_ms)
            + 2 * settings.aging_equalization_ms
            + (self.num_models + settings.num_bands) * turn_ms
            + 2 * self.num_waiting * self.lease_ms
            + (self.lease_ms if settings.model_limits else 0)
        )

    @cached_property
    def flow_ms(self) -> int:
        settings = self.settings
        heaviest = max(map(self.weight, self.tenants))
        num_passing = min(
            round(settings.locality_quantum_tokens * heaviest),
            settings.locality_max_passes * self.num_waiting,
        )
        return (self.num_waiting + num_passing) * self.model_ms

    def cost(self, num_samples: int) -> int:
        """What fairness charges at a grant."""
        return NUM_PROMPT + self.settings.output_token_weight * MAX_TOKENS * num_samples

    @cached_property
    def largest(self) -> float:
        return self.cost(self.most_slots) / min(map(self.weight, self.tenants))

    @cached_property
    def gap(self) -> float:
        most_running = self.num_executors * self.most_slots * self.largest
        return self.settings.locality_quantum_tokens + self.largest + 2 * most_running

    @cached_property
    def overtaken(self) -> float:
        least = 1 / max(map(self.weight, self.tenants))
        behind = self.gap + self.num_waiting * self.largest
        return self.num_waiting + (self.num_tenants - 1) * behind / least


def drawn(seed: int) -> Scene:
    """Any settings; the same for the same seed. 0 gives what the bounds were first tried with."""
    if not seed:
        return Scene()
    rng = random.Random(seed)
    models, tenants = "ABCDEF"[: rng.choice((2, 3, 3, 4, 6))], rng.randint(2, 4)
    num_executors, most_slots = rng.choice((1, 2, 2, 3, 4)), rng.choice((1, 2, 2, 4))
    load_ms = rng.choice((20, LOAD_MS, 300))
    num_queued = rng.choice((4, 8, 8, 16))
    num_bands = rng.choice((1, 2, 2, 3, 4))
    shares = [rng.choice((0.0, 0.1, 0.3)) for _ in range(num_bands)]
    settings = CoreSettings(
        max_queued_requests=num_queued,
        max_inflight=num_queued + rng.choice((4, 8, 16)),
        max_inflight_per_tenant=rng.choice((num_queued // 2, num_queued, 40)),
        num_bands=num_bands,
        band_min_shares=tuple(shares) if sum(shares) < 1 else (),
        band_max_wait_ms=tuple(rng.choice((50, 300, 500, 2_000)) for _ in range(num_bands)),
        aging_equalization_ms=rng.choice((100, 400, 400, 1_500)),
        switch_time_share=rng.choice((0.05, 0.2, 0.5, 1.0)),
        model_hold_ms=rng.choice((0, 50, 50, 500)),
        model_limits={model: rng.randint(1, 3) for model in models if rng.random() < 0.15},
        tenant_weights={f"t{n}": rng.choice((0.5, 1.0, 2.0, 5.0)) for n in range(tenants)},
        locality_quantum_tokens=rng.choice((0, 15, 15, 100)),
        locality_max_passes=rng.choice((0, 1, 2)),
        output_token_weight=rng.choice((1, 2, 4)),
        executor_grace_ms=rng.choice((100, 1_000)),
        max_known_models=1,
        max_fair_accounts=rng.choice((1, 100)),
        session_ttl_ms=rng.choice((100, 300_000)),
        max_prefix_blocks=rng.choice((2, 200)),
        load_backoff_ms=50,
        load_backoff_max_ms=100,
    )
    return Scene(
        settings,
        num_models=len(models),
        num_tenants=tenants,
        num_executors=num_executors,
        most_slots=most_slots,
        most_models=rng.randint(1, 3),
        lease_ms=rng.choice((50, LEASE_MS, LEASE_MS, 600)),
        load_ms={model: round(load_ms * rng.choice((0.5, 1, 1, 2))) for model in models},
    )

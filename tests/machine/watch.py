"""Hears all that happens in a world, and raises AssertionError when a promise is broken.

Starvation and fairness: scenes.py. Beside them, where they can be told from outside:

- Switches: one that costs somebody who waits his place is begun no sooner than ``load /
  switch_time_share`` after the last such one on the same executor.
- Shares: while somebody of a band with a share waits for the models of an executor, the band gets
  its share of the grants there until another model comes, less ``_LESS`` that debts and other
  bands' turns may cost. It is told where requests need one slot each, and nothing is reserved or
  limited.
- Limits: never more leases of a model than its limit on executors that are attached, unless they
  came back. In calm nobody else's count: their grace is over.
"""

from collections import Counter

from scheduler_svc.core.messages import (
    Action,
    Event,
    LeaseAdopted,
    LeaseEnded,
    LeaseGranted,
    ModelChanged,
    ModelLoadOrdered,
    ModelState,
    Tick,
)
from tests.machine.fair_pairs import Flow, Pairs
from tests.machine.honest_fleet import Client, World
from tests.machine.scenes import Scene

# events from one look at everybody to the next; who is granted is looked at each time
_LOOK_EVERY = 16
# grants
_LESS = 4


class Watch:
    """What is promised to whom, and since when."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.world = World(scene.settings, self.heard, scene.load_ms)
        self.pairs = Pairs(self.world, scene)
        self.calm_since_ms = 0
        # of models and of flows
        self.last_grant_ms: dict[Flow | str, int] = {}
        # of flows: grants so far, and when a request was first seen to wait in calm
        self.num_grants: Counter[Flow] = Counter()
        self.num_grants_at: dict[str, int] = {}
        # all that may still be spoken of, and those of them that had a lease
        self.known: dict[str, Client] = {}
        self.attempts: dict[str, int] = {}
        # executor -> no switch at somebody's cost before then
        self.next_switch_ms: dict[str, int] = {}
        # (executor, band): grants there while the band waited for it, and how many it got
        self.grants: Counter[tuple[str, int]] = Counter()
        self.got: Counter[tuple[str, int]] = Counter()
        # the largest part of each bound that was seen to be used
        self.used: dict[str, float] = {}
        self._num_heard = 0

    def disturbed(self, for_ms: int = 0) -> None:
        """The promises begin anew, so much later."""
        self.calm_since_ms = max(self.calm_since_ms, self.world.now_ms + for_ms + 1)
        self.pairs.forget()
        self.next_switch_ms.clear()

    def heard(self, event: Event, sent: list[Action]) -> None:
        """Something happened."""
        world = self.world
        self.known.update(world.clients)
        if isinstance(event, ModelChanged) and event.state is ModelState.FAILED:
            self.disturbed(self.scene.settings.load_backoff_max_ms)
        if isinstance(event, LeaseEnded) and self.attempts.get(event.request_id) == event.attempt:
            self.pairs.ended(self.known[event.request_id], event.num_generated_tokens)
        if isinstance(event, ModelChanged) and event.state is ModelState.RESIDENT:
            self._forget_shares(event.executor_id)
        waiting = world.waiting()
        is_calm = world.now_ms >= self.calm_since_ms
        if not is_calm:
            self.num_grants_at.clear()
            self.grants.clear()
            self.got.clear()
        for action in sent:
            match action:
                case LeaseGranted():
                    self._granted(action, waiting, is_calm)
                case LeaseAdopted():
                    self.attempts[action.request_id] = action.attempt
                case ModelLoadOrdered():
                    self._switches(action, waiting)
        if not is_calm:
            self.pairs.forget()
            return
        self.pairs.check(waiting)
        for client in waiting:
            flow = client.request.band, client.request.model
            self.num_grants_at.setdefault(client.request.request_id, self.num_grants[flow])
        self._num_heard += 1
        if self._num_heard % _LOOK_EVERY == 0 or isinstance(event, Tick):
            self.look(waiting)

    def served(self) -> set[str]:
        """The models that somebody serves now."""
        return {
            model
            for executor in self.world.executors.values()
            if executor.is_serving
            for model in executor.offers
        }

    def look(self, waiting: list[Client]) -> None:
        """Whoever waits has not waited for too long."""
        served = self.served()
        since_ms: dict[Flow | str, int] = {}
        for client in waiting:
            request = client.request
            if request.model in served:
                for what in (request.model, (request.band, request.model)):
                    since_ms[what] = min(client.accepted_ms, since_ms.get(what, client.accepted_ms))
                self._is_overtaken(client)
        for what, came_ms in since_ms.items():
            self._starves(what, came_ms)

    def _granted(self, action: LeaseGranted, waiting: list[Client], is_calm: bool) -> None:
        client = self.known[action.request_id]
        request = client.request
        flow = request.band, request.model
        self.pairs.granted(client, action.request_id in self.attempts)
        self.attempts[action.request_id] = action.attempt
        if is_calm:
            came_ms = [client.accepted_ms]
            for of_model in (other for other in waiting if other.request.model == request.model):
                if of_model.request.band == request.band:
                    came_ms.append(of_model.accepted_ms)
            self._starves(flow, min(came_ms))
            self._is_overtaken(client)
            self._shares(action.executor_id, client, waiting)
            self._is_limited(request.model)
        self.last_grant_ms[request.model] = self.last_grant_ms[flow] = self.world.now_ms
        self.num_grants[flow] += 1

    def _starves(self, what: Flow | str, came_ms: int) -> None:
        name, limit_ms = ("model", self.scene.model_ms)
        if isinstance(what, tuple):
            name, limit_ms = ("flow", self.scene.flow_ms)
        since_ms = max(came_ms, self.calm_since_ms, self.last_grant_ms.get(what, 0))
        self._use(name, self.world.now_ms - since_ms, limit_ms, what)

    def _is_overtaken(self, client: Client) -> None:
        request = client.request
        num = self.num_grants[request.band, request.model]
        num_at = self.num_grants_at.get(request.request_id, num)
        self._use("overtaken", num - num_at, self.scene.overtaken, client)

    def _use(self, name: str, much: float, limit: float, who: object) -> None:
        self.used[name] = max(self.used.get(name, 0.0), much / limit)
        assert much <= limit, (name, who)

    def _switches(self, order: ModelLoadOrdered, waiting: list[Client]) -> None:
        limits, name = self.scene.settings.model_limits, order.executor_id
        wanted = {client.request.model for client in waiting} - limits.keys()
        if wanted.isdisjoint(order.evict):
            return
        now_ms = self.world.now_ms
        assert now_ms >= self.next_switch_ms.get(name, 0), "switches too often"
        load_ms = self.world.load_ms(order.model)
        self.next_switch_ms[name] = now_ms + load_ms + self.scene.dwell_ms(order.model)

    def _shares(self, name: str, granted: Client, waiting: list[Client]) -> None:
        executor, settings = self.world.executors[name], self.scene.settings
        is_told = not settings.model_limits and not self.world.core._state.fleet.reservations
        present = [*waiting, granted] if is_told else []
        wide = any(client.request.num_samples > 1 for client in present)
        bands = {c.request.band for c in present if c.request.model in executor.models}
        for band, share in enumerate(settings.band_min_shares):
            key = name, band
            if not share or wide or band not in bands:
                self.grants.pop(key, None)
                self.got.pop(key, None)
                continue
            self.grants[key] += 1
            self.got[key] += granted.request.band == band
            assert self.got[key] >= share * self.grants[key] - _LESS, ("share", key)

    def _forget_shares(self, name: str) -> None:
        """Another model came to the executor."""
        for key in [key for key in self.grants if key[0] == name]:
            del self.grants[key], self.got[key]

    def _is_limited(self, model: str) -> None:
        limit = self.scene.settings.model_limits.get(model)
        if limit is not None:
            executors = [e for e in self.world.executors.values() if e.session is not None]
            leases = [lease for e in executors for lease in e.leases.values()]
            num = sum(lease.request.model == model for lease in leases)
            assert num <= limit

    def clean(self) -> None:
        """Forget those who will not be heard of any more."""
        running = {name for executor in self.world.executors.values() for name in executor.leases}
        for name in [n for n in self.known if n not in self.world.clients and n not in running]:
            del self.known[name]
            self.attempts.pop(name, None)
            self.num_grants_at.pop(name, None)

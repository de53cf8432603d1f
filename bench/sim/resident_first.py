"""The simple rival: never load while the model is on a device with a free slot, never drain.

Order of arrival. First whoever finds its model resident with a free slot, least loaded first;
then, oldest first, whoever could be loaded without waiting: an executor with a free slot whose
resident models are not all in use. Nobody is made to leave room for anybody, so a model that is
nowhere can wait for ever while all executors are kept busy by others.
"""

from bench.sim.reference import Backend, ReferencePolicy


class ResidentFirst(ReferencePolicy):
    """Resident first, no drain, no aging."""

    def _cycle(self) -> None:
        if not any(backend.num_free for backend in self._backends.values()):
            return
        self._pass(must_be_resident=True)
        self._pass(must_be_resident=False)

    def _pass(self, *, must_be_resident: bool) -> None:
        blocked: set[str] = set()
        while models := self._queues.keys() - blocked:
            model = min(models, key=lambda name: self._queues[name][0].arrival)
            backend = self._pick(model, must_be_resident)
            if backend is None:
                blocked.add(model)
            else:
                self._grant(backend, model)

    def _pick(self, model: str, must_be_resident: bool) -> Backend | None:
        usable = [
            backend
            for backend in self._serving(model)
            if backend.num_free
            and (
                model in backend.resident or (not must_be_resident and backend.has_room_for(model))
            )
        ]
        if not usable:
            return None
        return min(usable, key=lambda backend: (len(backend.running), backend.number))

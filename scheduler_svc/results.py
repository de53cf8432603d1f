"""Requests that have ended, read back from the store."""

from weakref import WeakValueDictionary

from headway.v1 import generation_pb2 as generation
from scheduler_svc.outputs import Output
from scheduler_svc.requests import LiveRequest
from scheduler_svc.store.base import Store


class Results:
    """Read by their tenant only. Those who follow one result share its tokens."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._replays: WeakValueDictionary[str, LiveRequest] = WeakValueDictionary()

    async def load(self, request_id: str, tenant: str) -> generation.GenerationResult:
        """The result of a finished request. Raises HeadwayError."""
        record = await self._store.get_result(request_id, tenant)
        return generation.GenerationResult.FromString(record.result)

    async def replay(self, request_id: str, tenant: str) -> LiveRequest:
        """A finished request as something that can be followed. Raises HeadwayError."""
        live = self._replays.get(request_id)
        if live is None or live.tenant != tenant:
            output = Output.replay(request_id, await self.load(request_id, tenant))
            body = generation.GenerationRequest()
            live = self._replays[request_id] = LiveRequest(request_id, tenant, output, body, False)
        return live

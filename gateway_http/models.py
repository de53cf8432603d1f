"""Models by name: the card, and what is needed to turn text into tokens and back.

Kept for ``model_ttl_s``, then asked for again with the digest that we have, so that files travel
only when they changed. While the scheduler is away an old answer is better than none.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from gateway_http.generation_defaults import GenerationDefaults, read_defaults
from gateway_http.model_text import Text
from gateway_http.settings import GatewaySettings
from gateway_http.text_pool import TextPool
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2, scheduler_pb2

GetModel = Callable[[str, str], Awaitable[scheduler_pb2.GetModelResponse]]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that can be asked for. ``text`` refuses text if the model has no tokenizer."""

    card: generation_pb2.ModelCard
    text: Text
    defaults: GenerationDefaults


@dataclass(slots=True)
class _Entry:
    model: LoadedModel
    fresh_until: float


class Models:
    """Least recently used cache; concurrent misses of one name share one look-up."""

    def __init__(self, get_model: GetModel, settings: GatewaySettings) -> None:
        self._get_model = get_model
        self._settings = settings
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lookups: dict[str, asyncio.Task[LoadedModel]] = {}
        self._pool = TextPool(settings)

    async def get(self, name: str) -> LoadedModel:
        """Raises MODEL_NOT_FOUND, or NO_CAPACITY when it cannot be known."""
        entry = self._entries.get(name)
        if entry is not None and time.monotonic() < entry.fresh_until:
            self._entries.move_to_end(name)
            return entry.model
        lookup = self._lookups.get(name)
        if lookup is None:
            lookup = asyncio.create_task(self._look_up(name, entry))
            self._lookups[name] = lookup
            lookup.add_done_callback(lambda task: self._looked_up(name, task))
        return await asyncio.shield(lookup)

    def close(self) -> None:
        """Stop the look-ups and the threads."""
        for lookup in self._lookups.values():
            lookup.cancel()
        self._pool.close()

    def _looked_up(self, name: str, task: asyncio.Task[LoadedModel]) -> None:
        del self._lookups[name]
        if not task.cancelled():
            task.exception()  # whoever waited has it; nobody may have

    async def _look_up(self, name: str, old: _Entry | None) -> LoadedModel:
        digest = old.model.card.assets_digest if old is not None else ""
        try:
            response = await self._get_model(name, digest)
        except HeadwayError as error:
            if old is not None and error.reason is Reason.NO_CAPACITY:
                return old.model
            if error.reason is Reason.MODEL_NOT_FOUND:
                self._entries.pop(name, None)
            raise
        if old is not None and not response.HasField("assets"):
            model = replace(old.model, card=response.card)
        else:
            files = await self._pool.load(response.card, response.assets)
            text = Text(response.card, files, self._pool)
            defaults = read_defaults(response.card.name, response.assets.generation_config_json)
            model = LoadedModel(response.card, text, defaults)
        now = time.monotonic()
        self._entries[name] = _Entry(model, now + self._settings.model_ttl_s)
        self._entries.move_to_end(name)
        while len(self._entries) > self._settings.max_cached_models:
            self._entries.popitem(last=False)
        return model

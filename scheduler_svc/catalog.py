"""The models that executors offer: their cards, and the tokenizer files that gateways need.

One name is one model: an executor that offers a known name with other weights is refused as long
as another executor serves it. Cards outlive their executors, since requests may still wait for
the model; assets are kept by digest. Both are bounded: what nobody serves makes room, what is
served stays, and the files of one model too many are left out.

No model is called unknown before the fleet had time to attach: to be told so ends a client's work
for good, while a model that is merely away is asked for again.
"""

from collections.abc import Callable, Iterable

import structlog

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from scheduler_svc.checks import check_name
from scheduler_svc.settings import SchedulerSettings

# All cards together travel in one ListModelsResponse.
_MAX_CARD_BYTES = 4_096

_log = structlog.get_logger()


class Catalog:
    """Model cards by name, with the executors that offer them now."""

    def __init__(self, settings: SchedulerSettings, clock_ms: Callable[[], int]) -> None:
        self._settings = settings
        self._clock_ms = clock_ms
        self._started_ms = clock_ms()
        self._cards: dict[str, generation.ModelCard] = {}
        self._offers: dict[str, set[tuple[str, int]]] = {}
        self._assets: dict[str, generation.ModelAssets] = {}
        self._num_asset_bytes = 0

    def attach(self, executor_id: str, session: int, offers: Iterable[fleet.ModelOffer]) -> None:
        """An executor serves these models from now on. Raises HeadwayError and changes nothing
        if one of them is refused."""
        # copies, because a part of a received message keeps the whole message in memory
        cards = [_copy_card(offer.card) for offer in offers]
        if len({card.name for card in cards}) != len(cards):
            raise _refused("a model is offered twice")
        for card in cards:
            self._check(executor_id, card)
        num_new = sum(card.name not in self._cards for card in cards)
        self._make_room(num_new)
        for card in cards:
            self._cards[card.name] = card
            self._offers.setdefault(card.name, set()).add((executor_id, session))

    def detach(self, executor_id: str, session: int) -> None:
        """The session is over."""
        for name in list(self._offers):
            self._offers[name].discard((executor_id, session))
            if not self._offers[name]:
                del self._offers[name]

    def card(self, model: str) -> generation.ModelCard:
        """Of any model that was offered before. Raises HeadwayError MODEL_NOT_FOUND, or NO_CAPACITY
        while that cannot be known."""
        card = self._cards.get(model)
        if card is not None:
            return card
        grace_ms = self._settings.executor_grace_ms
        if not self._cards or self._clock_ms() - self._started_ms < grace_ms:
            message = "No executor that offers the model has attached yet."
            raise HeadwayError(Reason.NO_CAPACITY, message, retry_after_ms=grace_ms)
        raise HeadwayError(Reason.MODEL_NOT_FOUND, "No such model.", field="model")

    def cards(self) -> list[generation.ModelCard]:
        """What can be asked for now, by name."""
        return [self._cards[name] for name in sorted(self._offers)]

    def wanted_assets(self, executor_id: str, session: int) -> list[str]:
        """Models of this executor whose assets nobody has sent yet."""
        return [
            name
            for name, offers in self._offers.items()
            if (executor_id, session) in offers
            and self._cards[name].assets_digest
            and self._cards[name].assets_digest not in self._assets
        ]

    def put_assets(
        self, executor_id: str, session: int, model: str, assets: generation.ModelAssets
    ) -> None:
        """Keep what a welcome asked for. Raises HeadwayError."""
        if (executor_id, session) not in self._offers.get(model, ()):
            raise _refused(f"assets of a model that is not offered: {model!r}")
        digest = self._cards[model].assets_digest
        num_bytes = assets.ByteSize()
        if not digest or digest in self._assets:
            return
        self._forget_idle_assets(self._settings.max_asset_bytes - num_bytes)
        if self._num_asset_bytes + num_bytes > self._settings.max_asset_bytes:
            _log.error("assets.refused", model=model, num_bytes=num_bytes)
            return
        self._num_asset_bytes += num_bytes
        own = generation.ModelAssets()
        own.CopyFrom(assets)
        self._assets[digest] = own

    def assets(self, model: str) -> generation.ModelAssets:
        """Empty for a model that has none. Raises HeadwayError NO_CAPACITY if they are not here."""
        digest = self.card(model).assets_digest
        if not digest:
            return generation.ModelAssets()
        assets = self._assets.get(digest)
        if assets is None:
            raise HeadwayError(Reason.NO_CAPACITY, "The model's files are not here yet.")
        return assets

    def _forget_idle_assets(self, most_bytes: int) -> None:
        """Make room, oldest first, of what no executor serves."""
        if self._num_asset_bytes <= most_bytes:
            return
        served = {self._cards[name].assets_digest for name in self._offers}
        for digest in [digest for digest in self._assets if digest not in served]:
            self._num_asset_bytes -= self._assets.pop(digest).ByteSize()
            if self._num_asset_bytes <= most_bytes:
                return

    def _check(self, executor_id: str, card: generation.ModelCard) -> None:
        check_name(card.name, "models.card.name", self._settings.max_name_chars)
        if card.ByteSize() > _MAX_CARD_BYTES:
            raise _refused(f"{card.name}: the card is larger than {_MAX_CARD_BYTES} bytes")
        if card.vocab_size == 0 or card.max_context_tokens < 2:
            raise _refused(f"{card.name}: vocab_size and max_context_tokens must be set")
        known = self._cards.get(card.name)
        others = {name for name, _ in self._offers.get(card.name, ())} - {executor_id}
        if known is not None and others and _identity(known) != _identity(card):
            raise _refused(f"{card.name}: {min(others)} offers another model of that name")

    def _make_room(self, num_new: int) -> None:
        excess = len(self._cards) + num_new - self._settings.max_known_models
        idle = [name for name in self._cards if name not in self._offers]
        if excess > len(idle):
            raise _refused("too many models")
        for name in idle[: max(0, excess)]:
            del self._cards[name]


def _copy_card(card: generation.ModelCard) -> generation.ModelCard:
    own = generation.ModelCard()
    own.CopyFrom(card)
    return own


def _identity(card: generation.ModelCard) -> tuple[object, ...]:
    """What must agree for two executors to serve one name; data types may differ."""
    return (
        card.family,
        card.vocab_size,
        card.max_context_tokens,
        tuple(card.eos_token_ids),
        card.weights_digest,
        card.assets_digest,
    )


def _refused(message: str) -> HeadwayError:
    return HeadwayError(Reason.INVALID_REQUEST, message, field="models")

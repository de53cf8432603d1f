"""Models and their files: one name is one model, and everything is bounded."""

from typing import Any

import pytest

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from scheduler_svc.catalog import Catalog
from scheduler_svc.settings import SchedulerSettings


def offer(name: str, **card: Any) -> fleet.ModelOffer:
    fields: dict[str, Any] = {"vocab_size": 10, "max_context_tokens": 10, **card}
    return fleet.ModelOffer(card=generation.ModelCard(name=name, **fields))


def made(**settings: Any) -> Catalog:
    """One whose scheduler did not start just now."""
    return Catalog(SchedulerSettings(**settings), iter((0, 10**9, 10**9)).__next__)


def assets(num_bytes: int) -> generation.ModelAssets:
    return generation.ModelAssets(tokenizer_json=b"x" * num_bytes)


def test_a_refused_attach_changes_nothing() -> None:
    catalog = made()
    catalog.attach("a", 1, [offer("m", weights_digest="1")])
    with pytest.raises(HeadwayError, match="another model"):
        catalog.attach("b", 2, [offer("n"), offer("m", weights_digest="2")])
    assert [card.name for card in catalog.cards()] == ["m"]
    with pytest.raises(HeadwayError, match="twice"):
        catalog.attach("b", 2, [offer("n"), offer("n")])


def test_data_types_may_differ_and_an_executor_may_change_its_own_model() -> None:
    catalog = made()
    catalog.attach("a", 1, [offer("m", dtype="bfloat16")])
    catalog.attach("b", 2, [offer("m", dtype="float32")])
    catalog.detach("b", 2)
    catalog.attach("a", 3, [offer("m", weights_digest="new")])
    assert catalog.card("m").weights_digest == "new"


def test_cards_outlive_their_executors_but_are_not_listed() -> None:
    catalog = made()
    catalog.attach("a", 1, [offer("m")])
    catalog.detach("a", 1)
    assert catalog.cards() == []
    assert catalog.card("m").name == "m"


def test_no_model_is_unknown_before_the_fleet_is_there() -> None:
    now_ms = 5_000
    catalog = Catalog(SchedulerSettings(executor_grace_ms=1_000), lambda: now_ms)

    def refusal() -> HeadwayError:
        with pytest.raises(HeadwayError) as caught:
            catalog.card("m")
        return caught.value

    catalog.attach("a", 1, [offer("other")])
    assert (refusal().reason, refusal().retry_after_ms) == (Reason.NO_CAPACITY, 1_000)
    now_ms += 999
    assert refusal().reason is Reason.NO_CAPACITY
    now_ms += 1
    assert refusal().reason is Reason.MODEL_NOT_FOUND
    empty = Catalog(SchedulerSettings(), lambda: now_ms)
    now_ms += 10**6
    with pytest.raises(HeadwayError) as caught:
        empty.card("m")
    assert caught.value.reason is Reason.NO_CAPACITY


def test_cards_are_bounded_and_unserved_ones_go_first() -> None:
    catalog = made(max_known_models=2)
    catalog.attach("a", 1, [offer("old"), offer("kept")])
    catalog.detach("a", 1)
    catalog.attach("a", 2, [offer("kept")])
    catalog.attach("b", 3, [offer("new")])
    with pytest.raises(HeadwayError) as caught:
        catalog.card("old")
    assert caught.value.reason is Reason.MODEL_NOT_FOUND
    with pytest.raises(HeadwayError, match="too many models"):
        catalog.attach("c", 4, [offer("one more")])


def test_assets_are_asked_for_once_and_bounded() -> None:
    catalog = made(max_asset_bytes=100)
    catalog.attach("a", 1, [offer("m", assets_digest="1"), offer("n", assets_digest="2")])
    assert catalog.wanted_assets("a", 1) == ["m", "n"]
    catalog.put_assets("a", 1, "m", assets(60))
    assert catalog.wanted_assets("a", 1) == ["n"]
    assert len(catalog.assets("m").tokenizer_json) == 60
    for num_bytes in (60, 200):  # there is no room besides what is served
        catalog.put_assets("a", 1, "n", assets(num_bytes))
    assert len(catalog.assets("m").tokenizer_json) == 60
    with pytest.raises(HeadwayError) as caught:
        catalog.assets("n")
    assert caught.value.reason is Reason.NO_CAPACITY
    catalog.detach("a", 1)
    catalog.attach("a", 2, [offer("n", assets_digest="2")])
    catalog.put_assets("a", 2, "n", assets(60))
    assert len(catalog.assets("n").tokenizer_json) == 60
    with pytest.raises(HeadwayError):
        catalog.assets("m")


def test_cards_are_small() -> None:
    catalog = made()
    with pytest.raises(HeadwayError, match="larger"):
        catalog.attach("a", 1, [offer("m", eos_token_ids=[9] * 5_000)])


def test_a_model_without_files_has_empty_assets() -> None:
    catalog = made()
    catalog.attach("a", 1, [offer("m")])
    assert catalog.wanted_assets("a", 1) == []
    assert catalog.assets("m") == generation.ModelAssets()

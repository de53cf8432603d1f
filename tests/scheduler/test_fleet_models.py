"""Models come and go on an executor, over real gRPC: the test speaks for the core."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from headway.reasons import Reason
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from scheduler_svc.core import messages
from scheduler_svc.translate import duration
from tests.scheduler.world import LOAD_MS, until_error, world

STATE_RESIDENT = fleet.ModelChange.STATE_RESIDENT
STATE_ABSENT = fleet.ModelChange.STATE_ABSENT
STATE_FAILED = fleet.ModelChange.STATE_FAILED
OTHER = generation.ModelCard(name="other", vocab_size=1_000, max_context_tokens=100)


def change(state: Any, model: str = "other", **fields: Any) -> fleet.AttachRequest:
    change = fleet.ModelChange(model=model, state=state, **fields)
    return fleet.AttachRequest(report=fleet.ExecutorReport(models=[change]))


async def test_offers_and_changes_of_models_reach_the_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world() as own:
        events: asyncio.Queue[messages.Event] = asyncio.Queue()
        post = own.process.runtime.post

        def listen(event: messages.Event) -> None:
            events.put_nowait(event)
            if not isinstance(event, messages.ModelChanged):
                post(event)

        monkeypatch.setattr(own.process.runtime, "post", listen)
        executor = own.executor()
        await executor.attach(absent=[OTHER], max_models=1)
        attached = events.get_nowait()
        assert isinstance(attached, messages.ExecutorAttached)
        assert attached.max_models == 1
        assert attached.models == (
            messages.ModelOffer("tiny", True),
            messages.ModelOffer("other", False, LOAD_MS),
        )
        failure = generation.Failure(reason="INTERNAL", message="why")
        for message, expected in (
            (change(STATE_ABSENT, "tiny"), ("tiny", messages.ModelState.ABSENT)),
            (
                change(STATE_RESIDENT, load_time=duration(70)),
                ("other", messages.ModelState.RESIDENT, 70),
            ),
            (
                change(STATE_FAILED, failure=failure),
                ("other", messages.ModelState.FAILED, None, "why"),
            ),
        ):
            await executor.call.write(message)
            assert await events.get() == messages.ModelChanged("e1", attached.session, *expected)


async def test_loads_and_decisions_leave_the_core(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with world() as own:
        core = own.process.runtime._core
        handle = core.handle

        def decide(event: messages.Event, now_ms: int) -> messages.Effects:
            effects = handle(event, now_ms)
            if not isinstance(event, messages.ExecutorAttached):
                return effects
            load = messages.ModelLoadOrdered("e1", event.session, "other", ("tiny",))
            why = messages.Decision("load", "req_1", "other", "it has waited long enough")
            return replace(effects, send=(*effects.send, load), decisions=(why,))

        monkeypatch.setattr(core, "handle", decide)
        executor = own.executor()
        await executor.attach(absent=[OTHER], max_models=1)
        orders = (await executor.read()).orders
        assert list(orders.loads) == [fleet.LoadModel(model="other", evict=["tiny"])]
    out = capsys.readouterr().out
    assert "decision.made" in out
    assert "it has waited long enough" in out
    assert "model.ordered" in out


@pytest.mark.parametrize(
    "message",
    [
        change(STATE_RESIDENT, "stranger"),
        change(fleet.ModelChange.STATE_UNSPECIFIED),
        change(STATE_RESIDENT, load_time=duration(-1)),
    ],
    ids=["not offered", "no state", "negative"],
)
async def test_changes_that_make_no_sense_end_the_stream(message: fleet.AttachRequest) -> None:
    async with world() as own:
        executor = own.executor()
        await executor.attach(absent=[OTHER], max_models=1)
        await executor.call.write(message)
        assert (await until_error(executor.call)).reason is Reason.INVALID_REQUEST

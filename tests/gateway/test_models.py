"""Models by name, while the scheduler knows them and while it is away."""

import pytest

from gateway_http.models import Models
from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import scheduler_pb2
from tests.gateway import tiny_model


async def test_an_old_answer_is_better_than_none_unless_the_model_is_gone() -> None:
    error: Reason | None = None
    asked: list[str] = []

    async def get_model(name: str, digest: str) -> scheduler_pb2.GetModelResponse:
        asked.append(digest)
        if error is not None:
            raise HeadwayError(error, "No.")
        return tiny_model.response(name, digest)

    models = Models(get_model, GatewaySettings(model_ttl_s=1e-9, num_text_workers=0))
    try:
        first = await models.get(tiny_model.NAME)
        error = Reason.NO_CAPACITY
        assert await models.get(tiny_model.NAME) is first
        assert asked == ["", first.card.assets_digest]
        error = Reason.MODEL_NOT_FOUND
        for _ in range(2):
            with pytest.raises(HeadwayError, match="No"):
                await models.get(tiny_model.NAME)
        assert asked[-1] == ""  # its files are asked for anew
        error = Reason.NO_CAPACITY
        with pytest.raises(HeadwayError, match="No"):
            await models.get(tiny_model.NAME)
    finally:
        models.close()

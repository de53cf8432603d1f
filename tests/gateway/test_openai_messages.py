"""What messages and tokens are to templates and clients."""

import math

from gateway_http.openai_chat_schema import ChatMessage
from gateway_http.openai_logprobs import finite
from gateway_http.openai_messages import template_messages


def test_names_and_roles_of_messages_reach_the_template() -> None:
    messages = [ChatMessage("developer", "Be short."), ChatMessage("user", "Hi", name="ann")]
    assert template_messages(messages) == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi", "name": "ann"},
    ]


def test_a_logprob_is_a_number_of_json() -> None:
    assert finite(-0.5) == -0.5
    assert finite(-math.inf) == -9999.0
    assert finite(math.nan) is None

"""A model's text, loaded from files."""

from typing import Any

from gateway_http.model_text import Text
from gateway_http.settings import GatewaySettings
from gateway_http.text import Chat
from gateway_http.text_pool import TextPool
from tests.gateway import tiny_model


async def loaded(
    template: str = tiny_model.TEMPLATE, name: str = tiny_model.NAME, **changes: Any
) -> Text:
    """Without worker processes; test_text_pool has them."""
    pool = TextPool(GatewaySettings(**{"num_text_workers": 0, **changes}))
    assets = tiny_model.assets(name)
    if name == tiny_model.NAME:
        assets.chat_template = template
    card = tiny_model.card(name)
    return Text(card, await pool.load(card, assets), pool)


MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT = Chat(messages=MESSAGES)


async def render(text: Text, chat: Chat = CHAT) -> str:
    return await text.render_chat(chat, "messages")

"""POST /v1/responses: one turn, of which nothing is kept."""

from typing import Any

import msgspec

from gateway_http.http_errors import invalid
from gateway_http.http_request import whole_body
from gateway_http.openai_endpoint import Call, Endpoint
from gateway_http.openai_job import Job
from gateway_http.openai_prompt import ChatWish
from gateway_http.openai_responses_schema import ResponsesRequest
from gateway_http.openai_sampling import (
    check_most,
    grammar_of,
    sampling_params,
)
from gateway_http.openai_schema import decode


class Responses(Endpoint):
    """A chat in other words: items in, items out."""

    async def prepare(self, call: Call) -> Job:
        body = decode(ResponsesRequest, await whole_body(call.request.receive))
        num_top = body.top_logprobs or 0
        check_most("top_logprobs", num_top, self.settings.max_top_logprobs)
        wants_logprobs = body.wants_logprobs
        if num_top and not wants_logprobs:
            message = "top_logprobs needs include: message.output_text.logprobs."
            raise invalid(message, "top_logprobs")
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options needs stream: true.", "stream_options")
        model = await self.model(body)
        prompt = await self.prompts.make(model, self._wish(body))
        sampling = sampling_params(
            body,
            model,
            max_tokens=body.max_output_tokens,
            logprobs=wants_logprobs,
            num_top=num_top,
            grammar=prompt.grammar,
        )
        requests = self.requests(call, body, model, [prompt.token_ids], sampling)
        spec = self.spec(
            "response",
            body,
            requests,
            form=prompt.form,
            has_call_reason=False,
            said=msgspec.json.encode(_said_back(body)).decode(),
        )
        return self.job(call, body, spec, model.text, requests)

    def _wish(self, body: ResponsesRequest) -> ChatWish:
        return ChatWish(
            messages=body.messages(),
            tools=body.chat_tools(),
            tool_choice=body.chat_choice(),
            is_parallel=body.parallel_tool_calls is not False,
            kwargs=body.chat_template_kwargs,
            wants_no_thought=body.reasoning is not None and body.reasoning.effort == "none",
            grammar=grammar_of(body, self.settings),
        )


def _said_back(body: ResponsesRequest) -> dict[str, Any]:
    """What a response says of its request."""
    choice = body.tool_choice
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "tool_choice": choice if isinstance(choice, str) else msgspec.to_builtins(choice) or "auto",
        "tools": [msgspec.to_builtins(tool) for tool in body.tools or ()],
        "text": {"format": _format(body)},
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "previous_response_id": None,
        "store": False,
        "background": False,
        "truncation": "disabled",
    }


def _format(body: ResponsesRequest) -> dict[str, Any]:
    form = body.text.format if body.text is not None else None
    if form is None or form.type != "json_schema":
        return {"type": form.type if form is not None else "text"}
    return {"type": form.type, "name": form.name, "schema": form.schema, "strict": True}

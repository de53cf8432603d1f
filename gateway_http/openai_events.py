"""GET /v1/requests/{request_id}/events: the rest of a stream, at any gateway."""

from starlette.requests import Request

from gateway_http.http_errors import invalid
from gateway_http.http_request import header
from gateway_http.openai_choice import ReplySpec, decode_spec
from gateway_http.openai_endpoint import Call, Endpoint, served_model
from gateway_http.openai_job import RESUME_HEADER, Follow, Job
from gateway_http.openai_place import Place, last_event, read_counts, stream_name


class Events(Endpoint):
    """For whoever has the stream's state and its tenant's key."""

    async def prepare(self, call: Call) -> Job:
        spec = decode_spec(header(call.request.scope, RESUME_HEADER.encode()) or "", RESUME_HEADER)
        request_ids = [call.request.path_params["request_id"], *spec.others]
        place = _place(call.request, spec, stream_name(request_ids))
        model = await served_model(self.client, spec.model)
        return Job(
            spec=spec,
            text=model.text,
            is_streaming=True,
            follow=Follow(request_ids, call.caller.tenant),
            is_kept=True,
            resume_from=place,
        )


def _place(request: Request, spec: ReplySpec, name: str) -> Place | None:
    """``after``, or the Last-Event-ID, or None for all of the stream."""
    place = last_event(request, spec.num_places)
    after = request.query_params.get("after")
    if after is not None:
        place = Place(name, read_counts(after, spec.num_places, "after"))
    if spec.num_echo_chars and (place is None or not all(place.counts)):
        # Nobody but who sent it knows the prompt.
        message = "The prompt was not told yet: only the same request again, by its key, has it."
        raise invalid(message, "Last-Event-ID")
    return place

"""How a model's makers want it to be sampled: the defaults in its generation_config.json.

They stand in for what an OpenAI request leaves out, as with vLLM. Tinker's clients always say what
they want. The file is not ours: a senseless value counts as absent, and is told of once.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import structlog
from msgspec import Meta

_log = structlog.get_logger()

# The bounds that hold for a request's own values, too.
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
MinP = Annotated[float, Meta(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Meta(gt=0, le=100)]


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """None: nothing is wanted, and the scheduler's own defaults hold."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def read_defaults(model: str, generation_config_json: bytes) -> GenerationDefaults:
    """What the file says, as far as it makes sense."""
    if not generation_config_json:
        return GenerationDefaults()
    try:
        config = msgspec.json.decode(generation_config_json, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        _log.warning("generation_config.refused", model=model)
        return GenerationDefaults()

    def take(name: str, kind: Any) -> Any:
        try:
            return msgspec.convert(config.get(name), kind | None)
        except msgspec.ValidationError as error:
            _log.warning("generation_config.ignored", model=model, key=name, cause=str(error))
            return None

    return GenerationDefaults(
        temperature=take("temperature", Temperature),
        top_p=take("top_p", TopP),
        top_k=take("top_k", TopK),
        min_p=take("min_p", MinP),
        repetition_penalty=take("repetition_penalty", RepetitionPenalty),
    )

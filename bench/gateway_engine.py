"""An executor whose engine makes tokens up but has the built-in model's tokenizer.

So the gateway has text to make, as with a real model. Settings are those of headway-executor.
"""

import dataclasses
import functools
import sys

import uvloop

from executor_svc.__main__ import serve
from executor_svc.core.engine import ModelAssets, StepOutput
from executor_svc.mock_engine import MockConfig, MockEngine
from executor_svc.settings import BUILTIN_MODEL, ExecutorSettings
from executor_svc.torch_engine.loader import assets_digest, read_assets
from executor_svc.worker import Worker
from headway import logs

_VOCAB_SIZE = 4_096
_END_ID = 0
# Ids of the tokenizer from here on are whole words or parts of words, but for two.
_FIRST_WORD = 259
_NOT_WORDS = {735: 736, 1_496: 1_497}


class TextMockEngine(MockEngine):
    """The mock engine, with text in every token."""

    def __init__(self, config: MockConfig) -> None:
        super().__init__(config)
        self._assets = read_assets(BUILTIN_MODEL)
        digest = assets_digest(self._assets)
        self._models = {
            name: dataclasses.replace(
                info, vocab_size=_VOCAB_SIZE, eos_token_ids=(_END_ID,), assets_digest=digest
            )
            for name, info in self._models.items()
        }

    def step(self) -> StepOutput:
        output = super().step()
        token_ids = (_FIRST_WORD + token_id for token_id in output.token_id)
        output.token_id = [_NOT_WORDS.get(token_id, token_id) for token_id in token_ids]
        return output

    def assets(self, model: str) -> ModelAssets:
        return self._assets


def main() -> None:
    settings = ExecutorSettings.load("headway-executor")
    logs.configure("executor", settings.log_level)
    config = MockConfig(
        models=settings.mock_model_names,
        num_slots=settings.max_num_seqs,
        step_ms=settings.mock_step_ms,
        vocab_size=_VOCAB_SIZE - _FIRST_WORD,
    )
    worker = Worker(
        functools.partial(TextMockEngine, config), max_backlog_tokens=settings.max_backlog_tokens
    )
    sys.exit(uvloop.run(serve(settings, worker)))


if __name__ == "__main__":
    main()

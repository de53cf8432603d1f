"""An executor whose engine makes tokens up but has the built-in model's tokenizer.

So the gateway has text to make, as with a real model. Settings are those of headway-executor.
"""

import dataclasses
import sys

import uvloop

from executor_svc.__main__ import serve
from executor_svc.core.engine import ModelAssets, ModelInfo
from executor_svc.mock_engine import MockConfig, MockEngine
from executor_svc.settings import BUILTIN_MODEL, ExecutorSettings
from executor_svc.torch_engine.loader import assets_digest, read_assets
from headway import logs

_NUM_TOKENS = 4_000  # those of the vocabulary that are drawn; ids above are special tokens


class TextMockEngine(MockEngine):
    """The mock engine, with text."""

    def __init__(self, config: MockConfig) -> None:
        super().__init__(config)
        self._assets = read_assets(BUILTIN_MODEL)

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        digest = assets_digest(self._assets)
        return tuple(dataclasses.replace(one, assets_digest=digest) for one in super().models)

    def assets(self, model: str) -> ModelAssets:
        return self._assets


def main() -> None:
    settings = ExecutorSettings.load("headway-executor")
    logs.configure("executor", settings.log_level)
    config = MockConfig(
        models=settings.mock_model_names,
        num_slots=settings.max_num_seqs,
        step_ms=settings.mock_step_ms,
        vocab_size=_NUM_TOKENS,
    )
    sys.exit(uvloop.run(serve(settings, TextMockEngine(config))))


if __name__ == "__main__":
    main()

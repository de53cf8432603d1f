"""The executor process: builds engine, worker, session and link, and ends them in order.

It ends with 0 when it was drained, and with 1 when the scheduler refuses it for good, when no
engine can be built, or when the engine dies: an executor without a healthy engine must not look
like one. A step that hangs changes nothing of that.
"""

import asyncio
import functools
import os
import signal
import sys
import uuid

import structlog
import uvloop

from executor_svc.core.engine import Engine
from executor_svc.core.session import Session
from executor_svc.link import Link
from executor_svc.mock_engine import MockConfig, MockEngine
from executor_svc.settings import ExecutorSettings
from executor_svc.step_log import StepLog
from executor_svc.stream import AttachRefusedError
from executor_svc.worker import EngineDiedError, Worker
from headway import logs

_log = structlog.get_logger()

# The engine's thread gives up the interpreter this often; with Python's 5 ms it would stall the
# event loop for milliseconds.
_SWITCH_INTERVAL_S = 0.001


def main() -> None:
    settings = ExecutorSettings.load("headway-executor")
    logs.configure("executor", settings.log_level)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    worker = Worker(
        functools.partial(build_engine, settings),
        max_backlog_tokens=settings.max_backlog_tokens,
        step_log=_open_step_log(settings),
    )
    sys.exit(uvloop.run(serve(settings, worker)))


def _open_step_log(settings: ExecutorSettings) -> StepLog | None:
    if settings.step_log is None:
        return None
    try:
        return StepLog(settings.step_log, max_bytes=settings.max_step_log_bytes)
    except OSError as error:
        sys.exit(f"headway-executor: step_log: {error}")


def build_engine(settings: ExecutorSettings) -> Engine:
    """The engine that the settings ask for; ends the process if it cannot be had."""
    if settings.engine == "torch":
        return _build_torch_engine(settings)
    return MockEngine(
        MockConfig(
            models=settings.mock_model_names,
            max_models=settings.max_models,
            load_ms=settings.mock_load_ms,
            num_slots=settings.max_num_seqs,
            step_ms=settings.mock_step_ms,
            tokens_per_step=settings.mock_tokens_per_step,
            prefill_ms_per_1k_tokens=settings.mock_prefill_ms_per_1k_tokens,
            vocab_size=settings.mock_vocab_size,
            max_context_tokens=settings.mock_max_context_tokens,
            eos_after_tokens=settings.mock_eos_after_tokens,
        )
    )


def _build_torch_engine(settings: ExecutorSettings) -> Engine:
    # For libgomp, which reads it when torch is imported and knows no other way.
    os.putenv("GOMP_SPINCOUNT", str(settings.openmp_spin_count))
    try:  # here, because a mock executor needs no torch
        from executor_svc.torch_engine.config import EngineConfig
        from executor_svc.torch_engine.engine import TorchEngine
        from executor_svc.torch_engine.files import ModelError
        from executor_svc.torch_engine.grammar import GrammarLimits
    except ModuleNotFoundError as error:
        sys.exit(f"headway-executor: engine: {error} (install headway[torch])")
    try:
        engine = TorchEngine(
            EngineConfig(
                models=settings.torch_models,
                max_models=settings.max_models,
                device=settings.device,
                dtype=settings.dtype,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                max_model_len=settings.max_model_len,
                block_size=settings.block_size,
                num_blocks=settings.num_blocks,
                kv_bytes=settings.kv_bytes,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                num_threads=settings.num_threads,
                max_logits_rows=settings.max_logits_rows,
                grammar_limits=GrammarLimits(
                    max_grammar_bytes=settings.max_grammar_bytes,
                    max_regex_bytes=settings.max_regex_bytes,
                    max_grammar_states=settings.max_grammar_states,
                    max_cached_grammars=settings.max_cached_grammars,
                    max_cached_grammar_bytes=settings.max_cached_grammar_bytes,
                    grammar_timeout_ms=settings.grammar_timeout_ms,
                    max_grammar_compile_bytes=settings.max_grammar_compile_bytes,
                    max_grammar_compilations=settings.max_grammar_compilations,
                ),
                quantization=settings.quantization,
                tensor_parallel_size=settings.tensor_parallel_size,
                tensor_parallel_timeout_ms=settings.tensor_parallel_timeout_ms,
                attention_backend=settings.attention_backend,
                enforce_eager=settings.enforce_eager,
                overlap_scheduling=settings.overlap_scheduling,
                enable_prefix_caching=settings.enable_prefix_caching,
                exact_mode=settings.exact_mode,
            )
        )
        _log.info("engine.built", attention_backend=engine.attention_backend)
        return engine
    except (ModelError, OSError) as error:
        sys.exit(f"headway-executor: model: {error}")
    except ValueError as error:  # it names the setting
        sys.exit(f"headway-executor: {error}")


async def serve(settings: ExecutorSettings, worker: Worker) -> int:
    """Run until drained; gives the exit status."""
    loop = asyncio.get_running_loop()
    engine = worker.engine
    engine_ready = asyncio.Event()
    session = Session(
        engine.models,
        num_slots=engine.num_slots,
        max_models=engine.max_models,
        max_leases=settings.max_leases,
        max_report_tokens=settings.max_report_tokens,
    )
    link = Link(
        settings,
        session,
        worker,
        engine_ready=engine_ready,
        incarnation=uuid.uuid4().hex,
        max_models=engine.max_models,
        assets={model.name: engine.assets(model.name) for model in engine.models},
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, link.drain)
    # From here on the engine is the worker's alone.
    worker.start(functools.partial(loop.call_soon_threadsafe, engine_ready.set))
    status = 1
    try:
        await link.run()
        status = 0
    except AttachRefusedError as error:
        _log.error("executor.refused", error=str(error))
    except EngineDiedError as error:
        _log.error("engine.died", exc_info=error)
    finally:
        is_closed = worker.close(settings.flush_timeout_ms / 1000)
        _log.info("server.stopped", status=status, is_engine_closed=is_closed)
    if not is_closed:
        # A thread that comes back from torch into an interpreter that is ending aborts the
        # process, which would look like a crash to whoever restarts those.
        logs.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    main()

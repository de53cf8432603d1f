"""Settings of an executor process: command line > EXECUTOR_* > TOML > default."""

import os
import socket
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from headway.settings import Settings, check_addresses

_DAY_MS = 86_400_000
BUILTIN_MODEL = Path(__file__).parent / "builtin_model"
BUILTIN_MODEL_NAME = "headway/tiny-pydoc"


class ExecutorSettings(Settings):
    """The defaults serve the built-in model on the CPU to a scheduler on this machine."""

    model_config = SettingsConfigDict(env_prefix="EXECUTOR_")
    config_env: ClassVar[str] = "EXECUTOR_CONFIG"

    # --- process
    executor_id: str = Field(
        default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}",
        min_length=1,
        max_length=200,
        description="Stable name, each process its own: a second one with the same name is refused "
        "while the first is attached.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged."
    )
    drain_timeout_ms: int = Field(
        30_000, ge=0, le=_DAY_MS, description="At shutdown, time for running leases to finish."
    )
    flush_timeout_ms: int = Field(
        5_000,
        ge=0,
        le=600_000,
        description="At shutdown, time after that to hand back what still runs.",
    )

    # --- scheduler
    scheduler_addresses: str = Field(
        "127.0.0.1:50051",
        description="Comma-separated host:port of schedulers; tried in turn until one takes us.",
    )
    max_message_bytes: int = Field(
        64 << 20, ge=1 << 16, le=1 << 30, description="Largest gRPC message, both ways."
    )
    max_report_tokens: int = Field(
        65_536,
        ge=1,
        le=1 << 20,
        description="Most tokens, alternatives and scores in one message to the scheduler; the "
        "scores of one prompt may be more.",
    )
    max_backlog_tokens: int = Field(
        1 << 20, ge=1, le=1 << 30, description="The engine pauses past this many untaken tokens."
    )
    step_log: Path | None = Field(
        None,
        description="File that gets a line of JSON for each step of the engine: what it computed, "
        "how long it took. Unset: none.",
    )
    max_step_log_bytes: int = Field(
        64 << 20, ge=1_000, le=1 << 40, description="Size of that file; later steps are left out."
    )
    max_leases: int = Field(
        10_000,
        ge=1,
        le=1_000_000,
        description="Leases held at once, ended ones included until they are acknowledged.",
    )
    attach_timeout_ms: int = Field(
        5_000, ge=10, le=600_000, description="Longest wait for a scheduler's welcome."
    )
    backoff_initial_ms: int = Field(
        100, ge=1, le=60_000, description="Longest pause after the first failure to attach."
    )
    backoff_max_ms: int = Field(
        2_000, ge=1, le=600_000, description="Longest pause between two tries to attach."
    )

    # --- engine
    engine: Literal["torch", "mock"] = Field(
        "torch", description="torch runs a model; mock makes tokens up, for load tests."
    )
    model: str = Field(
        str(BUILTIN_MODEL),
        min_length=1,
        description="Comma-separated models: folders or Hugging Face hub ids, each as it is or as "
        "name=folder-or-id.",
    )
    model_name: str = Field(
        "",
        description="Name to serve a single model under. Empty: the hub id, or the folder's name.",
    )
    max_models: int = Field(
        0, ge=0, le=1_000, description="Models on the device at once, the first ones first; 0: all."
    )
    device: str = Field("cpu", description="torch device, such as cpu or cuda:0.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Data type of weights and KV cache; auto is the checkpoint's own."
    )
    max_num_seqs: int = Field(32, ge=1, le=65_536, description="Sequences that run at once.")
    max_num_batched_tokens: int = Field(
        512, ge=1, le=1 << 20, description="Most tokens computed in one step."
    )
    max_model_len: int | None = Field(
        None, ge=1, description="Context in tokens. Unset: the model's own."
    )
    block_size: int = Field(16, ge=1, le=1024, description="Tokens in one block of the KV cache.")
    num_blocks: int | None = Field(
        None,
        ge=1,
        description="Blocks of each model's KV cache. Unset: what its part of kv_bytes holds.",
    )
    kv_bytes: int | None = Field(
        None,
        ge=1,
        description="Size of the KV cache, which max_models models share in equal parts. Unset: by "
        "the device's memory.",
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of a GPU's memory for weights and KV cache."
    )
    num_threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads of torch. Unset: 1 for a model below 100 million parameters, "
        "which more would slow down, else all cores. Executors that share a machine have to "
        "share its cores: set cores / executors.",
    )
    openmp_spin_count: int = Field(
        10_000,
        ge=0,
        le=1 << 40,
        description="How often a CPU thread of torch looks out for the next piece of a step before "
        "it goes to sleep; 10,000 take some 0.4 ms. Less costs a wake-up for each piece. On cores "
        "that others keep busy 0 is several times faster.",
    )

    attention_backend: Literal["auto", "flash", "torch", "triton", "cpu", "reference"] = Field(
        "auto",
        description="flash is the flash-attn package, torch its own FlashAttention (both: CUDA, "
        "block_size a multiple of 256), triton our kernels (CUDA), cpu for any device, reference "
        "for tests. auto: triton on a GPU in exact mode, else flash where it can be had and "
        "triton; cpu without a GPU.",
    )
    enforce_eager: bool = Field(
        False, description="On a GPU, run decode steps without CUDA graphs."
    )
    overlap_scheduling: bool | None = Field(
        None,
        description="Plan a step while the one before runs. Unset: on a GPU; a CPU gains nothing.",
    )
    enable_prefix_caching: bool = Field(
        True, description="Keep computed blocks of the KV cache for prompts that begin alike."
    )
    exact_mode: bool = Field(
        True,
        description="Promise tokens that do not depend on what else runs, so that streams can move "
        "between executors; costs some speed on a GPU. Off: nothing is promised.",
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8 keeps weights in 8 bits, each product then errs by about 1 %; CPU only.",
    )
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes that share each model, on GPUs in a row from device on. It has to "
        "divide the model's key-value heads, inner sizes and vocabulary.",
    )
    tensor_parallel_timeout_ms: int = Field(
        60_000,
        ge=100,
        le=_DAY_MS,
        description="Longest wait for another of these processes inside a step; then the executor "
        "ends.",
    )

    max_logits_rows: int | None = Field(
        None,
        ge=1,
        le=1 << 20,
        description="Tokens of a prompt that are scored together. Unset: as many as have 64 MiB of "
        "logits in float32; all of scoring takes some six times that.",
    )
    max_grammar_bytes: int = Field(
        65_536, ge=1, le=1 << 24, description="Largest JSON Schema, or choices together."
    )
    max_regex_bytes: int = Field(
        2_048, ge=1, le=1 << 16, description="Longest regular expression of a grammar."
    )
    max_grammar_states: int = Field(
        10_000,
        ge=1,
        le=1_000_000,
        description="States of a grammar's lexer, 0.3 to 2 kB each; past them its lease fails.",
    )
    max_cached_grammars: int = Field(
        64, ge=1, le=100_000, description="Compiled grammars that are kept for each model."
    )
    max_cached_grammar_bytes: int = Field(
        1 << 20, ge=1, le=1 << 30, description="Size of their sources together."
    )
    grammar_timeout_ms: int = Field(
        2_000, ge=1, le=600_000, description="Longest compilation of a grammar; past it: refused."
    )
    max_grammar_compile_bytes: int = Field(
        1 << 30,
        ge=1 << 28,
        le=1 << 40,
        description="Address space of a process that tries a grammar; past it: refused.",
    )
    max_grammar_compilations: int = Field(
        2, ge=1, le=64, description="Grammars of one model that are compiled at a time."
    )

    # --- mock engine
    mock_models: str = Field(
        "mock", min_length=1, description="Comma-separated names of the models it pretends to have."
    )
    mock_load_ms: int = Field(0, ge=0, le=600_000, description="Time that loading a model takes.")
    mock_step_ms: float = Field(
        20.0, ge=0, le=60_000, description="Time of a step; 0 is as fast as possible."
    )
    mock_tokens_per_step: int = Field(
        1, ge=1, le=1024, description="Tokens that a step makes for each sequence."
    )
    mock_prefill_ms_per_1k_tokens: float = Field(
        0.0, ge=0, le=60_000, description="Added to a step for each 1000 tokens that join in it."
    )
    mock_vocab_size: int = Field(
        32_000, ge=2, le=1 << 24, description="Token ids are below this; the last one is EOS."
    )
    mock_max_context_tokens: int = Field(
        32_768, ge=2, le=1 << 24, description="Prompt and generated tokens together."
    )
    mock_eos_after_tokens: int | None = Field(
        None, ge=1, description="Every sample ends by EOS at this many tokens. Unset: never."
    )

    @property
    def addresses(self) -> tuple[str, ...]:
        """The schedulers to try."""
        return _split(self.scheduler_addresses)

    @property
    def mock_model_names(self) -> tuple[str, ...]:
        return _split(self.mock_models)

    @property
    def torch_models(self) -> tuple[tuple[str, str], ...]:
        """(name for clients, folder or hub id) of each model that the torch engine serves."""
        entries = [_named(entry) for entry in _split(self.model)]
        if self.model_name and len(entries) == 1:
            entries = [(self.model_name, entries[0][1])]
        return tuple(entries)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        check_addresses("scheduler_addresses", self.addresses)
        names = self.mock_model_names
        if not names or len(set(names)) < len(names):
            raise ValueError("mock_models: names must be there and differ")
        models = self.torch_models
        if not models or not all(name and source for name, source in models):
            raise ValueError("model: a name or a folder is missing")
        if len(dict(models)) < len(models):
            raise ValueError("model: two models have the same name")
        if self.model_name and len(models) > 1:
            raise ValueError("model_name: is for a single model; write name=folder-or-id instead")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens: must not be less than max_num_seqs")
        if self.backoff_max_ms < self.backoff_initial_ms:
            raise ValueError("backoff_max_ms: must not be less than backoff_initial_ms")
        return self


def _named(entry: str) -> tuple[str, str]:
    """(name, source) of an entry of ``model``; a source without a name has one by itself."""
    path = Path(entry)
    if path == BUILTIN_MODEL:
        return BUILTIN_MODEL_NAME, entry
    if path.is_dir():
        return path.resolve().name, entry
    name, separator, source = entry.partition("=")
    return (name.strip(), source.strip()) if separator else (entry, entry)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())

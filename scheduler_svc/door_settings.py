"""Settings around the scheduler's core: the process, its streams, what comes in, what stays."""

from typing import Literal, Self

from pydantic import Field, model_validator

from headway.settings import Settings, is_loopback

DAY_MS = 86_400_000
_MAX_TOKEN_BYTES = 19  # of a StepFrame: three varints and a float


class DoorSettings(Settings):
    """The part of ``SchedulerSettings`` that shells and checks read, not the core."""

    # --- process
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(50051, ge=0, le=65_535, description="Port to listen on; 0 takes a free one.")
    allow_insecure: bool = Field(
        False, description="Listen without TLS on an address that is not loopback."
    )
    reflection: bool | None = Field(
        None, description="Serve gRPC reflection. Unset: only on a loopback address."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged."
    )
    drain_timeout_ms: int = Field(
        30_000, ge=0, le=DAY_MS, description="At shutdown, longest wait for accepted requests."
    )
    stop_grace_ms: int = Field(
        1_000, ge=0, le=60_000, description="At shutdown, time for open calls to end by themselves."
    )
    max_message_bytes: int = Field(
        64 << 20, ge=1 << 20, le=1 << 30, description="Largest gRPC message, both ways."
    )
    max_concurrent_streams: int = Field(
        10_000, ge=1, le=1_000_000, description="Open calls on one connection."
    )

    # --- garbage collector (headway.collector)
    collect_young_objects: int = Field(
        700, ge=100, le=1_000_000, description="Objects made between two collections of the young."
    )
    collect_young_rounds: int = Field(
        3, ge=1, le=1_000, description="Of so many, one collects also what survived one before."
    )
    collect_interval_ms: int = Field(
        10_000, ge=100, le=DAY_MS, description="Time between two looks for a good time to collect."
    )
    collect_max_live: int = Field(
        100,
        ge=0,
        le=10_000_000,
        description="A full collection, which stops everything, waits for so few live requests.",
    )
    collect_longest_ms: int = Field(
        3_600_000,
        ge=100,
        le=30 * DAY_MS,
        description="But no longer than this since the last one.",
    )

    # --- streams
    heartbeat_interval_ms: int = Field(
        1_000, ge=10, le=60_000, description="Longest silence of a healthy peer."
    )
    ack_linger_ms: int = Field(
        5,
        ge=0,
        le=1_000,
        description="Longest wait of a lease's acknowledgement for a grant to travel with.",
    )
    accept_linger_ms: int = Field(
        5,
        ge=0,
        le=1_000,
        description="Longest wait of a client stream's acceptance for the first tokens to travel "
        "with, where the request was granted at once.",
    )
    heartbeat_timeout_ms: int = Field(
        5_000, ge=50, le=600_000, description="A peer silent for this long is taken for dead."
    )
    write_timeout_ms: int = Field(
        30_000, ge=100, le=600_000, description="A peer that takes no message for so long is cut."
    )
    resume_grace_ms: int = Field(
        10_000, ge=0, le=DAY_MS, description="How long a request outlives its client's stream."
    )
    max_client_streams: int = Field(
        1_024, ge=1, le=100_000, description="Open and Generate calls at once."
    )
    max_subscriptions_per_stream: int = Field(
        8_192, ge=1, le=1_000_000, description="Requests that one stream may follow at once."
    )
    max_commands_per_message: int = Field(
        4_096, ge=1, le=100_000, description="Commands in one message of a client."
    )
    max_unread_answers: int = Field(
        16_384,
        ge=1,
        le=1_000_000,
        description="Answers that a peer has not taken; beyond it the peer is not read.",
    )
    max_frame_tokens: int = Field(
        16_384,
        ge=1,
        le=1 << 20,
        description="Tokens, alternatives and scores in one message to a client; the scores of one "
        "prompt may be more.",
    )
    max_orders_bytes: int = Field(
        4 << 20, ge=1 << 10, le=1 << 29, description="Grants in one message to an executor."
    )
    max_mailbox_events: int = Field(
        8_192, ge=1, le=1_000_000, description="Unhandled events; beyond it peers are read slower."
    )
    max_batch_events: int = Field(
        512, ge=1, le=100_000, description="Events handled between two commits."
    )
    generate_flush_ms: int = Field(
        20, ge=0, le=1_000, description="Generate sends at most one message in this time."
    )
    position_interval_ms: int = Field(
        1_000, ge=10, le=60_000, description="Least time between two positions of one request."
    )
    max_positions_per_tick: int = Field(
        1_000, ge=1, le=100_000, description="Positions computed in one position interval."
    )
    max_retrieve_wait_ms: int = Field(
        40_000, ge=0, le=600_000, description="Longest wait of one Retrieve."
    )
    max_retrieve_waiters: int = Field(
        4_096, ge=0, le=100_000, description="Retrieve calls waiting at once; others answer now."
    )
    max_snapshot_rows: int = Field(
        1_000,
        ge=1,
        le=100_000,
        description="Most queue rows of a snapshot; each takes some 10 us, all in one go.",
    )
    default_snapshot_rows: int = Field(
        100, ge=1, le=100_000, description="Queue rows of a snapshot when none are asked for."
    )
    snapshot_time_share: float = Field(
        0.1, ge=0.001, le=1, description="Most of the scheduler's time that snapshots may take."
    )
    max_snapshot_watchers: int = Field(16, ge=1, le=1_000, description="WatchSnapshot at once.")

    # --- requests
    default_max_tokens: int = Field(
        4_096, ge=1, le=1 << 24, description="Cap of max_tokens for requests that set none."
    )
    max_samples: int = Field(64, ge=1, le=4_096, description="Largest num_samples.")
    max_stop_strings: int = Field(16, ge=0, le=1_000, description="Stop strings of a request.")
    max_stop_string_bytes: int = Field(
        256, ge=1, le=65_536, description="Bytes of one stop string."
    )
    max_stop_token_ids: int = Field(64, ge=0, le=10_000, description="Stop tokens of a request.")
    max_top_logprobs: int = Field(
        20, ge=0, le=1_000, description="Largest top_logprobs, of tokens and of prompts."
    )
    max_logit_bias: int = Field(
        1_024, ge=0, le=1 << 20, description="Tokens with a logit bias in a request."
    )
    max_note_bytes: int = Field(
        1 << 20,
        ge=0,
        le=1 << 24,
        description="Size of the note that a client gives with a request.",
    )
    max_abandon_after_ms: int = Field(
        DAY_MS, ge=1, le=30 * DAY_MS, description="Longest abandon_after of a future."
    )
    max_grammar_bytes: int = Field(
        65_536, ge=1, le=1 << 24, description="Size of a request's grammar."
    )
    max_regex_bytes: int = Field(
        2_048, ge=1, le=1 << 20, description="Size of a grammar's regular expression."
    )
    max_choices: int = Field(1_024, ge=1, le=1 << 20, description="Texts of a grammar's choice.")
    max_grammar_parts: int = Field(
        4_096, ge=1, le=1 << 20, description="Grammars that one is made of, and repetitions of one."
    )
    max_prompt_alternatives: int = Field(
        20, ge=0, le=1_000, description="Largest num_alternatives of prompt scoring."
    )
    max_name_chars: int = Field(
        256, ge=16, le=4_096, description="Length of tenants, keys, ids and names."
    )
    default_band: int = Field(1, ge=0, le=63, description="Band of requests that set none.")
    default_queue_timeout_ms: int = Field(
        600_000, ge=1, le=DAY_MS, description="Queue timeout of requests that set none."
    )
    max_queue_timeout_ms: int = Field(
        DAY_MS, ge=1, le=30 * DAY_MS, description="Cap of queue timeouts."
    )
    default_execution_timeout_ms: int = Field(
        600_000, ge=1, le=DAY_MS, description="Execution timeout of requests that set none."
    )
    max_execution_timeout_ms: int = Field(
        DAY_MS, ge=1, le=30 * DAY_MS, description="Cap of execution timeouts."
    )

    prefix_block_tokens: int = Field(
        64, ge=1, le=65_536, description="Prompts are compared in blocks of so many tokens."
    )

    # --- models, results
    max_models_per_executor: int = Field(64, ge=1, le=1_000, description="Offers of one executor.")
    max_slots_per_executor: int = Field(
        4_096, ge=1, le=100_000, description="Slots that an executor may claim."
    )
    max_asset_bytes: int = Field(
        512 << 20, ge=0, le=1 << 34, description="Tokenizer files remembered, all models."
    )
    max_result_bytes: int = Field(
        1 << 30, ge=0, le=1 << 40, description="Results remembered; the oldest go first."
    )
    max_tombstones: int = Field(
        1_000_000, ge=0, le=100_000_000, description="Ids of expired results remembered."
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if not self.is_loopback and not self.allow_insecure:
            raise ValueError(f"host: {self.host} is not loopback: that needs allow_insecure")
        if self.heartbeat_timeout_ms < 2 * self.heartbeat_interval_ms:
            raise ValueError("heartbeat_timeout_ms: at least twice heartbeat_interval_ms")
        if self.max_frame_tokens * _MAX_TOKEN_BYTES > self.max_message_bytes // 2:
            raise ValueError("max_frame_tokens: too many for max_message_bytes")
        if self.max_orders_bytes > self.max_message_bytes // 2:
            raise ValueError("max_orders_bytes: at most half of max_message_bytes")
        return self

    @property
    def is_loopback(self) -> bool:
        """Nobody outside this machine can connect."""
        return is_loopback(self.host)

    @property
    def has_reflection(self) -> bool:
        """The setting, or its default for this host."""
        return self.is_loopback if self.reflection is None else self.reflection

    @property
    def address(self) -> str:
        """As gRPC wants it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

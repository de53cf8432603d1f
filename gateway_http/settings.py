"""What an operator can turn on the gateway; every limit has its unit in its name."""

import hashlib
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from headway.settings import Settings, check_addresses, is_loopback

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MIB = 1 << 20
MIN_SECRET_CHARS = 16


class GatewaySettings(Settings):
    """The HTTP gateway of Headway: REST in, gRPC out."""

    model_config = SettingsConfigDict(env_prefix="GATEWAY_")
    config_env: ClassVar[str] = "GATEWAY_CONFIG"

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    """Port to listen on; 0 takes a free one, which the log line server.started names."""
    reuse_port: bool = False
    """Share the port with other gateway processes of this user, if all of them say so."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log lines to write."""
    client_id: str = "gateway"
    """What the scheduler calls this process in its logs and on the monitor."""
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """Comma separated tenant=key pairs; several keys of one tenant are fine. None: open."""
    api_keys_file: Path | None = None
    """TOML file of hashed API keys with their limits; see python -m gateway_http.keys --help."""
    api_keys_reload_s: PositiveFloat = 5.0
    """How often, at most, the file of API keys is looked at for changes."""
    key_pepper: SecretStr = SecretStr("")
    """Secret under which the file's keys are hashed; the same at all gateways."""
    allow_insecure: bool = False
    """Serve without API keys on an address that is not loopback."""
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Comma separated names that requests may have as their Host, without ports; * is any. None:
    any with API keys or allow_insecure, else localhost and addresses, against DNS rebinding."""
    monitor: Literal["off", "loopback", "key"] = "loopback"
    """Who may see /monitor and /metrics: nobody, callers on this machine that come through no
    proxy, or whoever has an API key with the scope monitor."""
    monitor_interval_s: PositiveFloat = 1.0
    """The scheduler is asked for its state this often at most, however many monitors are open."""
    health_interval_s: PositiveFloat = 1.0
    """The scheduler is asked this often at most whether work can be done, for health and ready."""

    collect_young_objects: Annotated[int, Field(ge=100, le=1_000_000)] = 4_000
    """Objects made between two collections of the young by the garbage collector."""
    collect_young_rounds: Annotated[int, Field(ge=1, le=1_000)] = 5
    """Of so many, one collects also what survived one before."""
    collect_interval_ms: Annotated[int, Field(ge=100)] = 10_000
    """Time between two looks for a good time to collect everything, which stops all streams."""
    collect_max_live: Annotated[int, Field(ge=0)] = 16
    """A full collection waits until so few requests are followed."""
    collect_longest_ms: Annotated[int, Field(ge=100)] = 3_600_000
    """But no longer than this since the last one."""

    scheduler_addresses: Annotated[tuple[str, ...], NoDecode] = ("127.0.0.1:50051",)
    """Comma separated host:port of the schedulers, tried in turn."""
    max_message_bytes: PositiveInt = 64 * MIB
    """Largest gRPC message to send or to take."""
    max_request_bytes: PositiveInt = 32 * MIB
    """Largest single request, encoded for the scheduler."""
    submit_timeout_s: PositiveFloat = 5.0
    """Longest wait for the scheduler to accept or refuse; then 503."""
    unary_timeout_s: PositiveFloat = 5.0
    """Longest wait for any other answer of the scheduler; then 503."""
    reconnect_timeout_s: PositiveFloat = 30.0
    """Accepted streams outlive a lost scheduler for this long; then they end with 503."""
    connect_timeout_s: PositiveFloat = 2.0
    """Longest wait for one scheduler to open the stream before the next one is tried."""
    reconnect_backoff_min_ms: PositiveInt = 50
    """First pause between two tries to reach a scheduler."""
    reconnect_backoff_max_ms: PositiveInt = 1_000
    """Longest pause between two tries to reach a scheduler."""
    max_resumes: PositiveInt = 3
    """A stream that lacks tokens is asked for again so often without a new one; then it fails."""
    max_inflight: PositiveInt = 20_000
    """Requests in the scheduler's care through this gateway at once; then 503."""
    model_ttl_s: PositiveFloat = 5.0
    """A model's card is asked for again after this long; its files only if they changed."""
    max_cached_models: PositiveInt = 64
    """Tokenizers kept in memory."""

    max_body_bytes: PositiveInt = 64 * MIB
    """Largest HTTP request body, outside of the OpenAI endpoints; then 413."""
    max_openai_body_bytes: PositiveInt = 8 * MIB
    """Largest body of a request to an OpenAI endpoint; then 413."""
    max_body_values: PositiveInt = 1_200_000
    """Most values in a body's JSON, by its commas: parsing them holds up everybody. Then 413."""
    max_total_body_bytes: PositiveInt = 1024 * MIB
    """Bodies of all requests being handled, together; then 503."""
    body_timeout_s: PositiveFloat = 30.0
    """Longest time for a request body, beyond what min_body_bytes_per_s allows it."""
    min_body_bytes_per_s: PositiveInt = 1024
    """Slowest pace of a request body."""
    max_header_bytes: PositiveInt = 64 * 1024
    """Largest sum of all HTTP request headers; then the connection is closed."""
    max_header_fields: PositiveInt = 100
    """Most HTTP request headers; then the connection is closed."""
    header_timeout_s: PositiveFloat = 10.0
    """Longest time from the first byte of a request, or of a connection, to its last header."""
    max_connections: PositiveInt = 16_384
    """Open HTTP connections and running requests; then 503."""
    keep_alive_s: PositiveInt = 75
    """Idle HTTP connections are closed after this long."""
    stream_write_timeout_s: PositiveFloat = 60.0
    """A streaming client that takes nothing for this long is cut off."""
    max_unread_tokens: PositiveInt = 262_144
    """Tokens, and alternatives of tokens, that may wait for one streaming client, some 64 bytes
    each; then it is cut off."""
    max_unsent_bytes: PositiveInt = 64 * 1024
    """Bytes that the kernel takes for a connection ahead of what it sends: so much later is a
    client that takes nothing noticed."""
    shutdown_grace_s: PositiveFloat = 10.0
    """After SIGTERM running requests may end by themselves for this long."""

    max_samples: PositiveInt = 64
    """Largest n: samples of one prompt."""
    max_prompts: PositiveInt = 64
    """Most prompts in one completions request."""
    max_sequences: PositiveInt = 256
    """Most samples over all prompts of one completions request."""
    max_stop_strings: PositiveInt = 16
    """Most stop strings, and most stop token ids, of one request."""
    max_stop_string_chars: PositiveInt = 256
    """Longest stop string."""
    max_messages: PositiveInt = 4_096
    """Most messages of one chat."""
    max_tools: PositiveInt = 128
    """Most tools of one chat."""
    max_top_logprobs: PositiveInt = 20
    """Most alternatives of one token, in top_logprobs or a completion's logprobs."""
    max_logit_bias: PositiveInt = 1_024
    """Most tokens in one logit_bias."""
    max_grammar_bytes: PositiveInt = 64 * 1024
    """Longest JSON Schema or list of choices that an output has to fit."""
    max_schema_values: PositiveInt = 20_000
    """Most values in one JSON Schema, and in those of all tools of a chat."""
    max_schema_levels: PositiveInt = 32
    """Most levels of objects and lists in one JSON Schema."""
    max_regex_chars: PositiveInt = 2_048
    """Longest regular expression that an output has to match."""
    chat_template_kwargs: Annotated[tuple[str, ...], NoDecode] = ("enable_thinking:bool",)
    """Comma separated name:type of what chat_template_kwargs may set; bool, int, float or str."""
    reasoning_formats: Annotated[tuple[str, ...], NoDecode] = ()
    """Comma separated model=format, think or none, for models whose template does not show it."""
    tool_formats: Annotated[tuple[str, ...], NoDecode] = ()
    """Comma separated model=format, none, hermes, llama3 or qwen3_coder, likewise for calls."""
    max_rendered_chars: PositiveInt = 64 * MIB
    """Longest text that a chat template may produce."""
    num_text_workers: Annotated[int, Field(ge=0)] = 2
    """Processes for templates and for tokenising long texts, some 30 MB and a copy of the
    tokenizers each. 0: a thread of the gateway, where neither time nor memory can be limited."""
    max_text_jobs: PositiveInt = 1_024
    """Texts waiting for a worker; then 503."""
    inline_text_chars: PositiveInt = 1_024
    """Texts and chats up to this length are made into tokens without a worker."""
    text_timeout_s: PositiveFloat = 2.0
    """A worker that takes longer for one text is killed; then 400."""
    text_load_timeout_s: PositiveFloat = 30.0
    """A worker that takes longer to read a tokenizer is killed; then 400."""
    max_text_worker_bytes: PositiveInt = 2048 * MIB
    """Address space of one text worker; a text that needs more ends it, and is answered by 400."""

    signing_key: SecretStr = SecretStr("")
    """Signs Tinker sampling sessions; the same at all gateways. Needed where there are keys."""
    tinker_queue_timeout_s: PositiveFloat = 7_200.0
    """Longest wait of a Tinker sample in the queue; the SDK gives up after two hours itself."""
    tinker_hold_s: Annotated[float, Field(gt=0, le=40)] = 30.0
    """How long a Tinker SDK's poll is held before it is told to ask again."""
    tinker_abandon_after_s: Annotated[float, Field(ge=60)] = 300.0
    """A Tinker sample that nobody has polled for this long is cancelled."""
    tinker_poll_pause_s: PositiveFloat = 1.0
    """A held poll whose scheduler answers too early asks it again after this long."""
    tinker_token_lifetime_s: Annotated[int, Field(ge=600)] = 3_600
    """A token that stands for an API key is good for so long; tinker 0.22 renews it five minutes
    before its end."""
    tinker_max_outstanding: PositiveInt = 2_000
    """Samples that one Tinker sampling client may wait for at once; each holds a connection."""
    tinker_use_poller: bool = False
    """Have Tinker SDKs wait with one connection a sampling client; they see no queue then."""
    tinker_announce_bytes: PositiveInt = 1 * MIB
    """Larger Tinker results are announced by their size first, so that clients can make room."""
    tinker_info_message: str = ""
    """Shown by Tinker SDKs, as information, to everybody who opens a session."""
    tinker_warning_message: str = ""
    """Shown by Tinker SDKs, as a warning, to everybody who opens a session."""
    tinker_error_message: str = ""
    """Shown by Tinker SDKs, as an error, to everybody who opens a session, which is made anyway."""
    retry_after_min_s: PositiveInt = 1
    """Least Retry-After ever sent."""
    retry_after_max_s: PositiveInt = 60
    """Largest Retry-After ever sent; SDKs ignore larger ones."""

    @field_validator(
        "scheduler_addresses",
        "api_keys",
        "allowed_hosts",
        "chat_template_kwargs",
        "reasoning_formats",
        "tool_formats",
        mode="before",
    )
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        secrets = set()
        for key in keys:
            tenant, equals, secret = key.get_secret_value().partition("=")
            if not (tenant and equals and secret and secret.isascii()):
                raise ValueError("every entry must read tenant=key, with a key in ASCII")
            secrets.add(secret)
        if len(secrets) < len(keys):
            raise ValueError("a key stands for one tenant, and is named once")
        return keys

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_kwargs(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            name, _, kind = entry.partition(":")
            if not (name.isidentifier() and kind in ("bool", "int", "float", "str")):
                raise ValueError("every entry must read name:type, with bool, int, float or str")
        return entries

    @field_validator("reasoning_formats")
    @classmethod
    def _check_reasoning(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        return _check_formats(entries, ("none", "think"))

    @field_validator("tool_formats")
    @classmethod
    def _check_tools(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        return _check_formats(entries, ("none", "hermes", "llama3", "qwen3_coder"))

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        check_addresses("scheduler_addresses", self.scheduler_addresses)
        if not (self.has_keys or self.allow_insecure or is_loopback(self.host)):
            raise ValueError(f"host {self.host} is not loopback: set api_keys, or allow_insecure")
        if self.monitor == "key" and not self.has_keys:
            raise ValueError("monitor: key needs api_keys or api_keys_file")
        if self.api_keys_file and len(self.key_pepper.get_secret_value()) < MIN_SECRET_CHARS:
            raise ValueError(
                f"key_pepper: api_keys_file needs at least {MIN_SECRET_CHARS} characters"
            )
        if self.has_keys and len(self.signing_key.get_secret_value()) < MIN_SECRET_CHARS:
            # Made from the keys it would be known to whoever knows them, and could name any tenant.
            raise ValueError(
                f"signing_key: at least {MIN_SECRET_CHARS} characters are needed with API keys"
            )
        if self.retry_after_min_s > self.retry_after_max_s:
            raise ValueError("retry_after_min_s must not exceed retry_after_max_s")
        if self.reconnect_backoff_min_ms > self.reconnect_backoff_max_ms:
            raise ValueError("reconnect_backoff_min_ms must not exceed reconnect_backoff_max_ms")
        if self.max_request_bytes > self.max_message_bytes // 2:
            raise ValueError("max_request_bytes must be at most half of max_message_bytes")
        return self

    @property
    def has_keys(self) -> bool:
        """Whether callers need an API key."""
        return bool(self.api_keys) or self.api_keys_file is not None

    def signing_secret(self) -> bytes:
        """The secret behind everything that the gateways sign instead of remembering."""
        return hashlib.sha256(self.signing_key.get_secret_value().encode()).digest()


def _check_formats(entries: tuple[str, ...], formats: tuple[str, ...]) -> tuple[str, ...]:
    for entry in entries:
        model, _, form = entry.rpartition("=")
        if not model or form not in formats:
            raise ValueError(f"every entry must read model=format, with {', '.join(formats)}")
    return entries

"""All configuration: TOML and command line into one frozen `Config`, read once, handed down in pieces.

Every bound of the system is a field here with its unit in the name and a word on why this value; the docs' table of
bounds is checked against `Limits` (tests/test_docs.py). Nothing else reads the environment.
"""

import os
import shutil
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil
from msgspec import Struct

from keepwarm.core.rate_limit import KIMI_TIERS, OrgLimits

PACKAGED_MODEL = "smollm2-135m-instruct"
PACKAGED_ALIASES = (  # the names in the vendors' published examples, so that those run unchanged
    "moonshot-v1",
    "moonshot-v1-8k",
    "moonshot-v1-32k",
    "moonshot-v1-128k",
    "MiniMax-M2.1",
    "gemini-1.5-flash-001",
)
NORMALISERS = ("billing-header", "clock", "moving-reminder")  # what keepwarm.cache.normalise can do
POSTGRESQL_SCHEME = "postgresql://"
REDIS_SCHEMES = ("redis://", "rediss://", "unix://")
MIB = 1024 * 1024
DISK_BYTES_DEFAULT = 10_000_000_000
DOCUMENT_ENVIRONMENT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DYLD_", "OPENBLAS_")


class ConfigError(Exception):
    """The configuration cannot be used; the message is one line that says what to do."""


class ModelConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The model served. `path` None is the packaged one. `n_ctx` None is the context it was trained with."""

    name: str = PACKAGED_MODEL
    aliases: tuple[str, ...] = PACKAGED_ALIASES
    path: str | None = None
    prepare: str = "auto"  # "auto" (packaged model only) | "off" | a weight type such as "Q4_0"
    attention: Literal["auto", "flash", "plain"] = "auto"
    determinism: Literal["auto", "strict", "fast"] = "auto"
    n_ctx: int | None = None
    n_streams: int = 8
    n_ubatch: int = 512  # rows llama.cpp evaluates at once; also the longest prefill chunk
    n_threads: int | None = None  # None: the machine's cores
    thread_wait: Literal["auto", "spin", "sleep"] = "auto"  # how llama.cpp's threads wait for each other
    kv_type: Literal["f16", "bf16", "f32", "q8_0", "q4_0"] = "f16"  # how K and V are kept; others are slow on a CPU
    normalise: tuple[str, ...] = (
        "billing-header",
    )  # what of a prompt's volatile lines is rewritten (docs/normalisers.md)
    engine: Literal["llama", "scripted"] = "llama"


class CacheConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The prefix store and cache objects."""

    host_bytes: int | None = None  # None: a quarter of RAM
    disk_bytes: int | None = None  # None: 10 GB, or a tenth of the free disk if that is less; 0: no disk tier
    policy: Literal["cost", "lru", "s3fifo"] = "cost"  # what is evicted first (docs/eviction.md)
    tenant_lease_bytes_max: int | None = None  # bytes of all leases of a tenant; None: whatever the disk tier holds
    auto_tokens_min: int = 512  # automatic reuse from this prompt length on, as MiniMax documents it
    mark_tokens_min: int = (
        512  # shortest prefix a cache_control breakpoint caches, as Anthropic's newest models have it
    )
    default_ttl_s: int = 3600  # Kimi's 2025 default; the 2024 edition says a day
    ttl_max_s: int = 86400  # Kimi's page says an hour, its own examples reset to a day
    object_tokens_min: int = 1024  # of a Gemini cachedContent, as its 3.x models have it; at most half the window
    object_tokens_max: int = 128_000  # Kimi's limit for one cache; Gemini's is the window
    tenant_tokens_max: int = 1_000_000  # Kimi's limit for all caches of a user
    settle: Literal["auto", "always", "off"] = "auto"  # re-evaluate a conversation's tail while idle


class BillingConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """What turns cost. A model without an entry in `models` has no prices: its use is recorded, and costs nothing."""

    sheets_dir: str | None = None  # more price sheets, *.toml, beside the shipped ones
    models: dict[str, str] = {}  # served name or alias → "SHEET/MODEL", or "SHEET@VERSION/MODEL" for that version only


class WarmPrompt(Struct, frozen=True, forbid_unknown_fields=True):
    """A prefix to compute at start, before anyone asks: a system message with these texts in a row, and tools.

    Paths are relative to where the server is started.
    """

    tenant: str  # whose requests will find it; with `dev` the API key they carry
    name: str = ""  # for the log; "" is its number in the file
    system: str = ""
    system_file: str | None = None  # in place of `system`
    files: tuple[str, ...] = ()  # appended to the system text as they are
    tools_file: str | None = None  # JSON: the `tools` member of a chat request
    lease: bool = False  # keep it on disk as a cache object is kept; else it may be evicted like any prompt


class RatesConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Rate limits of organisations (docs/limits.md)."""

    default_tier: str | None = None  # of organisations that have none; None: they are not limited
    tiers: dict[str, OrgLimits] = {}  # beside Kimi's, or in place of one of them
    cache_reads_count: bool = True  # whether tokens read from the cache count towards TPM and TPD
    redis_url: str | None = None  # where uses are counted; None: in this process


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds on everything a client or a fault could make grow."""

    body_bytes_max: int = 16 * MIB  # a 128k-token prompt is about 0.6 MB of text; documents and tools come on top
    header_bytes_max: int = 32 * 1024  # common proxies allow 8 to 32 KiB
    body_read_s_max: float = 60.0  # a slow upload, or a sender that stops
    keep_alive_s: int = 75  # longer than the 60 s of most load balancers, so that they close first
    turns_max: int = 64  # running and queued; the next one gets 429 before any work
    turns_per_organisation_max: int = 48  # so that one cannot fill the queue alone, however many projects it has
    turn_s_max: float = 600.0  # a turn still running then ends with a timeout error
    connections_max: int = 1024  # below the usual limit of open files
    stop_strings_max: int = 16  # Kimi allows 5, OpenAI 4; more do no harm
    stop_bytes_max: int = 256  # Kimi allows 32; text is held back for as long
    tools_max: int = 128  # Kimi's limit
    messages_max: int = 4096  # the template's loop runs once for each
    choices_max: int = 5  # Kimi's limit
    top_logprobs_max: int = 20  # OpenAI's limit
    schema_bytes_max: int = 64 * 1024  # a grammar grows with its schema
    name_chars_max: int = 256  # Kimi's limit, as the next four
    description_chars_max: int = 512  # Kimi's
    metadata_pairs_max: int = 16  # Kimi's
    metadata_key_chars_max: int = 64  # Kimi's
    metadata_value_chars_max: int = 512  # Kimi's
    tag_chars_max: int = 128  # Kimi's limit
    tags_per_object_max: int = 32  # each is a row written with the object
    objects_per_tenant_max: int = 1000  # each is rebuilt when the engine restarts
    list_page_max: int = 1000  # Kimi names none; a page repeats all messages
    max_tokens_default: int = 1024  # Kimi's default
    document_bytes_max: int = 12 * MIB  # what base64 leaves of body_bytes_max
    document_chars_max: int = 2_000_000  # of all documents of a request; half a million tokens, beyond any window here
    document_s_max: float = 120.0  # a PDF of 600 pages takes 60 s of a core, and the engine's threads go first
    document_memory_bytes_max: int = 512 * MIB  # to read one, beside the libraries' own; an ordinary one needs 50 MB
    documents_at_once_max: int = 2  # processes that read documents, 150 MB and a core each; more documents wait
    document_cache_bytes: int = 32 * MIB  # texts read lately, so that a conversation's document is read once
    file_bytes_max: int = 100 * MIB  # of an uploaded file; Kimi's limit, Gemini's is 2 GB
    files_per_tenant_max: int = 1000  # Kimi's limit; uploads under way count
    file_bytes_per_tenant_max: int = 10_000 * MIB  # Kimi's limit; uploads under way count with what they announce
    file_ttl_s: float = 172_800.0  # Gemini's 48 hours for its files; Kimi's are kept until they are deleted
    upload_idle_s_max: float = 3600.0  # a broken upload can be gone on with for so long, then its bytes are deleted
    prefill_delay_ms_max: float = 250.0  # the longest a prefill chunk may keep others' next token waiting
    event_queue_max: int = 4096  # events of one turn waiting for a slow client; then the turn is cancelled
    fragment_cache_bytes: int = 64 * MIB  # token ids of text already seen, so a long context is not tokenised again
    engine_start_s_max: float = 900.0  # loading, preparing and measuring a large model
    engine_stall_s_max: float = 120.0  # an engine with turns and no word for this long is restarted
    engine_restart_delay_s_max: float = 30.0  # back-off between restarts doubles up to this
    sse_comment_s: float = 15.0  # a comment line this often while nothing else is sent, so proxies keep the connection
    db_busy_s_max: float = 10.0  # another process, the command line say, may hold the database


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything the server needs to know, checked."""

    host: str = "127.0.0.1"
    port: int = 8080
    data_dir: str = ""
    database_url: str = ""  # of a PostgreSQL database; "": SQLite, in data_dir
    dev: bool = False
    log_format: Literal["auto", "console", "json"] = "auto"
    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    rates: RatesConfig = RatesConfig()
    limits: Limits = Limits()
    billing: BillingConfig = BillingConfig()
    warm: tuple[WarmPrompt, ...] = ()

    def host_bytes(self) -> int:
        """Budget of the host-RAM tier in bytes."""
        return self.cache.host_bytes or psutil.virtual_memory().total // 4

    def disk_bytes(self) -> int:
        """Budget of the disk tier in bytes; 0 when there is none. What the tier holds already counts as free disk."""
        if self.cache.disk_bytes is not None:
            return self.cache.disk_bytes
        path = self.store_dir()
        held = sum(entry.stat().st_size for entry in path.glob("*/*")) if path.is_dir() else 0
        Path(self.data_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
        return min(DISK_BYTES_DEFAULT, (shutil.disk_usage(self.data_dir).free + held) // 10)

    def store_dir(self) -> Path:
        """Where the disk tier keeps its files."""
        return Path(self.data_dir) / "store"

    def n_threads(self) -> int:
        """Threads llama.cpp computes with: one a physical core, since two on one core only share its vector unit."""
        return self.model.n_threads or psutil.cpu_count(logical=False) or os.cpu_count() or 1

    def engine_environment(self) -> dict[str, str]:
        """Environment of the engine's process.

        llama.cpp's threads meet at barriers many times a layer. Spinning there is fastest on idle cores and collapses
        when another process takes one of them (measured: 50 times slower); sleeping costs some speed and never
        collapses. "auto" sleeps where the threads leave no core free (docs/decisions/0012).
        """
        wait = self.model.thread_wait
        if wait == "auto":
            wait = "sleep" if self.n_threads() >= (os.cpu_count() or 1) else "spin"
        return dict(os.environ) if wait == "spin" else {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}


def document_environment() -> dict[str, str]:
    """Environment of the process that reads a hostile document: what Python and its libraries need to load, no secrets.

    Hash seed and locale are fixed, so that a document gives the same text everywhere; one thread and one arena, since it
    does one thing and its address space is limited.
    """
    kept = {name: value for name, value in os.environ.items() if name.startswith(DOCUMENT_ENVIRONMENT)}
    same = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    small = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return {**kept, **same, **small}


def default_data_dir() -> str:
    """$KEEPWARM_DATA_DIR, else $XDG_DATA_HOME/keepwarm, else ~/.local/share/keepwarm."""
    named = os.environ.get("KEEPWARM_DATA_DIR")
    if named:
        return named
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return str(Path(base) / "keepwarm")


def default_database_url() -> str:
    """$KEEPWARM_DATABASE_URL: where it is kept out of command lines, which others on the machine can read."""
    return os.environ.get("KEEPWARM_DATABASE_URL", "")


def default_api_key() -> str | None:
    """$KEEPWARM_API_KEY: what the commands that ask a running server show it."""
    return os.environ.get("KEEPWARM_API_KEY")


def load(path: str | None, overrides: dict[str, Any]) -> Config:
    """The file at `path` (or nothing) with `overrides` from the command line on top: {"port": 1, "model": {…}}.

    Raises ConfigError.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as exc:
            raise ConfigError(f"cannot read config {path}: {exc.strerror}") from exc
        except tomllib.TOMLDecodeError as exc:
            raise ConfigError(f"config {path} is not valid TOML: {exc}") from exc
    for key, value in overrides.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    raw.setdefault("data_dir", default_data_dir())
    raw.setdefault("database_url", default_database_url())
    model = raw.get("model", {})
    if model.get("path") is not None and "name" not in model:
        model = {"name": Path(model["path"]).stem, "aliases": [], "prepare": "off", **model}
        raw["model"] = model
    try:
        config = msgspec.convert(raw, Config)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"config {path or 'on the command line'}: {exc}") from exc
    if config.dev and config.host not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigError(f"--dev accepts any key, so it binds loopback only; remove --host {config.host} or --dev")
    if config.database_url and not config.database_url.startswith(POSTGRESQL_SCHEME):
        raise ConfigError(f"database_url must begin with {POSTGRESQL_SCHEME}; empty is a file in data_dir")
    for name in config.model.normalise:
        if name not in NORMALISERS:
            where = f"config {path or 'on the command line'}: $.model.normalise"
            raise ConfigError(f"{where}: {name!r} is not one of {', '.join(NORMALISERS)}")
    _check_rates(f"config {path or 'on the command line'}: $.rates", config.rates)
    for number, prompt in enumerate(config.warm):
        _check_warm(f"config {path or 'on the command line'}: $.warm[{number}]", prompt)
    return config


def _check_rates(where: str, rates: RatesConfig) -> None:
    """Raises ConfigError."""
    tiers = {**KIMI_TIERS, **rates.tiers}
    if rates.default_tier is not None and rates.default_tier not in tiers:
        raise ConfigError(f"{where}.default_tier: {rates.default_tier!r} is not one of {', '.join(tiers)}")
    if rates.redis_url is not None and not rates.redis_url.startswith(REDIS_SCHEMES):
        raise ConfigError(f"{where}.redis_url must begin with one of {', '.join(REDIS_SCHEMES)}")


def _check_warm(where: str, prompt: WarmPrompt) -> None:
    """Raises ConfigError."""
    if not prompt.tenant.strip():
        raise ConfigError(f"{where}.tenant is empty; name the tenant whose requests begin like this")
    if prompt.system and prompt.system_file is not None:
        raise ConfigError(f"{where} has both system and system_file; give one of them")
    if not (prompt.system or prompt.system_file is not None or prompt.files):
        raise ConfigError(f"{where} has no text; give system, system_file or files")

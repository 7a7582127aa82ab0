"""Everything about the gateway that can be configured, read once: `CLOUDMATRIX_<NAME>` in the environment."""

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """Settings of one gateway process. Raises pydantic's ValidationError, which names the variable at fault."""

    model_config = SettingsConfigDict(env_prefix="CLOUDMATRIX_", extra="ignore", frozen=True)

    host: str = "127.0.0.1"
    """Address the gateway listens on. Any but a loopback address makes API keys mandatory."""
    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port; 0 takes a free one."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    """Where the pool and the directory of workers live."""
    pool_disk: Path | None = None
    """Folder of the pool's disk tier, where the keeper of this machine writes blocks; none: DRAM alone."""
    data_dir: Path = Path("~/.local/share/cloudmatrix")
    """Folder for everything the service writes."""
    model: str = "smollm2-135m"
    """Name of the served model in the catalogue."""
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """Bearer keys of the operator, separated by commas; they open everything, the admin API too."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Origins, separated by commas, whose web pages may call the API from a browser; `*`: all. None by default."""
    database_url: SecretStr | None = None
    """Where tenants, keys and the ledger are: postgresql://… or sqlite:///FILE; None: a file in the data folder."""
    key_pepper: SecretStr | None = None
    """Secret under which keys are hashed, the same for all gateways; None: a file in the data folder."""
    limit_window_s: float = Field(default=60.0, gt=0)
    """What a minute is for limits per minute."""
    lease_s: float = Field(default=30.0, ge=1)
    """How long after a gateway's death its requests still count as under way."""
    limited_max_tokens: int = Field(default=1024, ge=1)
    """`max_tokens` of callers with a token limit or budget who name none."""

    max_in_flight: int = Field(default=512, ge=1)
    """Requests served or waiting at once; the next one gets a 429."""
    max_queued_per_tenant: int = Field(default=512, ge=1)
    """Requests of one tenant that wait for a worker; its next one gets a 429."""
    max_sequences_per_worker: int = Field(default=64, ge=1)
    """Sequences sent to a decode worker at once, per worker; the others wait in the gateway, in fair order."""
    ttft_target_s: float = Field(default=120.0, gt=0)
    """Longest time to first token worth serving: who would wait longer is refused at once, or dropped when it did."""
    tpot_target_s: float | None = Field(default=None, gt=0)
    """Time per output token to keep: fewer sequences decode together when it is exceeded. None: no such limit."""
    autoscale: bool = False
    """Turn workers from prefill to decode and back as the load asks. In one gateway only."""
    autoscale_ttft_s: float = Field(default=2.0, gt=0)
    """Time to first token that the autoscaler keeps nearly every request within, if it can."""
    autoscale_tpot_s: float = Field(default=0.05, gt=0)
    """Time per output token that the autoscaler keeps nearly every request within, if it can."""
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024)
    """Largest request body accepted."""
    max_choices: int = Field(default=16, ge=1, le=128)
    """Largest `n`."""
    max_prompts: int = Field(default=64, ge=1)
    """Most prompts in one call of `/v1/completions`."""

    keep_alive_s: float = Field(default=10.0, gt=0)
    """Longest silence on a stream before a comment line is sent."""
    drain_s: float = Field(default=30.0, ge=0)
    """How long requests that were taken in may go on after SIGTERM or Ctrl-C."""
    failover_s: float = Field(default=20.0, ge=0)
    """How long a request whose worker was lost waits for another one before it fails."""
    retry_after_s: float = Field(default=1.0, gt=0)
    """What a 429 or 503 tells clients to wait."""
    directory_poll_s: float = Field(default=0.25, gt=0)
    """Pause between two reads of the directory of workers."""
    otel: Literal["off", "console", "otlp"] = "off"
    """Where spans of requests go: nowhere, standard error, or OTEL_EXPORTER_OTLP_ENDPOINT."""
    log_format: Literal["text", "json"] = "text"
    """Log lines for people, or one JSON object a line with the request's id; json logs the end of every request."""
    request_log: Path | None = None
    """File with one line for each request that is over, without prompts; none: no such file."""
    history_size: int = Field(default=1000, ge=1)
    """Finished requests whose records are kept for `GET /api/requests/{id}`."""

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(key.strip() for key in value.split(",") if key.strip())
        return value

    @field_validator("data_dir")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser()

    @property
    def key_required(self) -> bool:
        """Whether callers must show a key: keys exist, or somebody other than this machine can call."""
        return bool(self.api_keys) or not is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether an address to listen on reaches this machine alone. A name other than localhost counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""What a simulated run leaves behind: every request with its instants, every instance, and the totals."""

from dataclasses import dataclass, field

from app.matrix.autoscaler import Change
from app.twin.fleet import Unit
from app.twin.instance import Job


@dataclass(slots=True)
class Outcome:
    """What became of the requests, and the totals of the run. A job without `finished_at` was not served."""

    jobs: list[Job] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    now: float = 0.0
    num_events: int = 0
    hit_tokens: int = 0
    prompt_tokens: int = 0
    loaded_bytes: int = 0
    load_s: float = 0.0
    load_idle_s: float = 0.0
    handed_over_bytes: int = 0
    handover_s: float = 0.0
    handover_idle_s: float = 0.0
    """Seconds that the same transfers take when nobody else sends."""
    pool_evictions: int = 0
    pool_blocks_lost: int = 0
    num_preempted: int = 0
    num_restarted: int = 0
    recomputed_tokens: int = 0
    """Tokens whose KV was computed again because of a fault."""
    role_changes: list[tuple[float, Change]] = field(default_factory=list)

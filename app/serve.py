"""`python -m app.serve`: the gateway's process, on a socket that the supervisor bound (or one of its own)."""

import gc
import logging

from app.gateway import create_app
from app.matrix.web import run_web
from app.settings import Settings
from observe import logs

GARBAGE = (10_000, 20, 20)
"""When the collector of cycles looks: Python's own 700 allocations are those of one or two requests."""


def main() -> None:
    """Serve until SIGTERM; streams that are under way are finished first."""
    settings = Settings()
    level = logging.INFO if settings.log_format == "json" else logging.WARNING
    logs.configure(settings.log_format, process="gateway", level=level)
    app = create_app(settings)
    # Modules, vocabulary and application stay until the end: the collector need not look through them again and again.
    gc.freeze()
    gc.set_threshold(*GARBAGE)
    run_web(app, host=settings.host, port=settings.port, drain_s=settings.drain_s)


if __name__ == "__main__":
    main()

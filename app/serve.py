"""`python -m app.serve`: the gateway's process, on a socket that the supervisor bound (or one of its own)."""

import logging

from app.gateway import create_app
from app.matrix.web import run_web
from app.settings import Settings
from observe import logs


def main() -> None:
    """Serve until SIGTERM; streams that are under way are finished first."""
    settings = Settings()
    level = logging.INFO if settings.log_format == "json" else logging.WARNING
    logs.configure(settings.log_format, process="gateway", level=level)
    run_web(create_app(settings), host=settings.host, port=settings.port, drain_s=settings.drain_s)


if __name__ == "__main__":
    main()

"""`python -m app.console.serve`: the console's process."""

import os

from app.console.proxy import create_console
from app.matrix.web import run_web

DRAIN_S = 10.0
"""How long a page's requests may go on after SIGTERM; chats go on in the gateway."""


def main() -> None:
    """Serve the console of the gateway named by `CLOUDMATRIX_GATEWAY_URL`."""
    gateway_url = os.environ.get("CLOUDMATRIX_GATEWAY_URL", "http://127.0.0.1:8000")
    host = os.environ.get("CLOUDMATRIX_HOST", "127.0.0.1")
    port = int(os.environ.get("CLOUDMATRIX_CONSOLE_PORT", "8080"))
    run_web(create_console(gateway_url), host=host, port=port, drain_s=DRAIN_S)


if __name__ == "__main__":
    main()

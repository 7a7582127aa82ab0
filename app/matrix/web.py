"""How a web process of the service (gateway, console) listens: on the socket handed down, else on its own."""

import math
import os
import socket

import uvicorn
from starlette.types import ASGIApp

from engine.lifeline import exit_with_parent


def run_web(app: ASGIApp, *, host: str, port: int, drain_s: float) -> None:
    """Serve `app` until SIGTERM or SIGINT; requests that were taken in may go on for `drain_s` more.

    With `CLOUDMATRIX_LISTEN_FD` in the environment the listening socket of that number is taken over and the process
    leaves when its parent does; without it, `host` and `port` are bound here.
    """
    handed_down = os.environ.get("CLOUDMATRIX_LISTEN_FD")
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        backlog=2048,
        timeout_graceful_shutdown=math.ceil(drain_s),
        proxy_headers=False,  # an address that a key is bound to is the one that connects, not one that is claimed
        server_header=False,
        date_header=False,
    )
    server = uvicorn.Server(config)
    if handed_down is None:
        server.run()
        return
    exit_with_parent()
    server.run(sockets=[socket.socket(fileno=int(handed_down))])

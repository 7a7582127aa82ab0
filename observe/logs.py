"""Log lines of a process: text for people, or one JSON object a line, with the id of the request they speak of.

Nothing that is logged holds a prompt, an answer or a secret: callers log ids, counts and seconds.
"""

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any, Literal, get_args

VARIABLE = "CLOUDMATRIX_LOG_FORMAT"
Format = Literal["text", "json"]
FORMATS: tuple[str, ...] = get_args(Format)
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
CHATTY = ("httpx", "httpcore", "websockets", "opentelemetry", "alembic")
"""Libraries that write a line for every call they make."""
_PLAIN = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "color_message", "taskName"}

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The request that is being served here; empty outside of one."""


class JsonLines(logging.Formatter):
    """`{"time", "level", "logger", "message", "process", …}`; what a call gave as `extra` stands beside them."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": self._process,
        }
        if current := request_id.get():
            line["request_id"] = current
        line.update((key, value) for key, value in vars(record).items() if key not in _PLAIN)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(style: str, *, process: str, level: int = logging.INFO) -> None:
    """Log to standard error from now on. `process`: its name in the service. Raises ValueError for an unknown style."""
    if style not in FORMATS:
        raise ValueError(f"{VARIABLE}={style}: choose one of {', '.join(FORMATS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process) if style == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)

"""Every way the gateway can say no, as one tree, and the one shape in which a client sees it.

    GatewayError
    ├── InvalidRequestError        400   the request can never succeed as it is
    │   ├── UnsupportedError       400   a field or value this service does not offer
    │   └── ContextLengthError     400   prompt, or prompt and answer, exceed the model's context
    ├── AuthenticationError        401
    ├── PermissionDeniedError      403   a valid key whose scope does not reach this far
    ├── NotFoundError              404
    │   └── ModelNotFoundError     404
    ├── MethodNotAllowedError      405
    ├── ConflictError              409
    ├── BodyTooLargeError          413
    ├── MediaTypeError             415
    ├── RateLimitError             429   a limit of the caller's own; come back after `retry_after_s`
    │   └── QuotaError             429   a budget is spent: coming back does not help
    ├── OverloadedError            429   admission is full; come back after `retry_after_s`
    ├── InternalError              500
    ├── UnavailableError           503   nobody can serve now; come back after `retry_after_s`
    └── DeadlineError              504   the client's own time limit passed first

The shape is OpenAI's envelope, `{"error": {"message", "type", "param", "code"}}`, whose `code` the SDKs expect to be
a string or null.
"""

from typing import ClassVar

import msgspec


class ErrorBody(msgspec.Struct, frozen=True):
    """The inside of the envelope. `param` names the field at fault, dotted and indexed: `messages[0].content`."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(msgspec.Struct, frozen=True):
    """What every failing answer, and every error event of a stream, looks like."""

    error: ErrorBody


class GatewayError(Exception):
    """Base of all errors that reach a client."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    retryable: ClassVar[bool | None] = None
    """What `x-should-retry` says; None leaves the SDK's own rule for the status in force."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self._code = code

    @property
    def body(self) -> ErrorBody:
        """The envelope's inside."""
        return ErrorBody(self.message, self.type, self.param, self._code or self.code)

    def encode(self) -> bytes:
        """The envelope as JSON."""
        return msgspec.json.encode(ErrorEnvelope(self.body))

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers beyond content type and length: when to retry, and whether."""
        headers: list[tuple[bytes, bytes]] = []
        if self.retry_after_s is not None:
            headers.append((b"retry-after-ms", b"%d" % max(1, round(self.retry_after_s * 1000))))
            headers.append((b"retry-after", b"%d" % max(1, round(self.retry_after_s))))
        if self.retryable is not None:
            headers.append((b"x-should-retry", b"true" if self.retryable else b"false"))
        return headers


class InvalidRequestError(GatewayError):
    """The request can never succeed as it is."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedError(InvalidRequestError):
    """A field or value that this service does not offer, refused by name rather than ignored."""

    code = "unsupported_parameter"


class ContextLengthError(InvalidRequestError):
    """The prompt alone, or with the asked-for answer, exceeds the model's context."""

    code = "context_length_exceeded"


class HeadersTooLargeError(InvalidRequestError):
    """The request's headers together are longer than a request needs."""

    status = 431
    code = "headers_too_large"


class AuthenticationError(GatewayError):
    """No key, or a wrong one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Names the scheme, as RFC 9110 asks of a 401."""
        return [*super().headers(), (b"www-authenticate", b"Bearer")]


class PermissionDeniedError(GatewayError):
    """The key is valid, but does not open this."""

    status = 403
    type = "permission_error"
    code = "permission_denied"


class NotFoundError(GatewayError):
    """No such route or resource."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFoundError(NotFoundError):
    """The named model is not served here."""

    code = "model_not_found"


class MethodNotAllowedError(GatewayError):
    """The route exists, but not for this method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class ConflictError(GatewayError):
    """The thing is not in a state in which this can be done."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"
    retryable = False


class BodyTooLargeError(GatewayError):
    """The body exceeds the configured limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class MediaTypeError(GatewayError):
    """The body is not declared as JSON."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class RateLimitError(GatewayError):
    """A limit of the caller's own key, user or tenant."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class QuotaError(RateLimitError):
    """A budget is spent, or the request is larger than its limit will ever allow."""

    type = "insufficient_quota"
    code = "insufficient_quota"
    retryable = False


class OverloadedError(GatewayError):
    """As many requests as may be are in flight."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class InternalError(GatewayError):
    """A fault of ours; the details are in the log under the request id."""

    code = "internal_error"


class UnavailableError(GatewayError):
    """No worker can serve this now."""

    status = 503
    type = "server_error"
    code = "service_unavailable"


class DeadlineError(GatewayError):
    """The client's own time limit passed before an answer began."""

    status = 504
    type = "server_error"
    code = "deadline_exceeded"
    retryable = False

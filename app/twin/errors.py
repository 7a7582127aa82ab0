"""What the twin refuses, in one line that names the key or the line to change."""


class TwinError(ValueError):
    """A scenario, trace or profile that cannot be; the message names the key, or the file and line."""

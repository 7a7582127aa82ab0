"""What goes wrong with a model file."""


class ModelFileError(ValueError):
    """A model file that cannot be served as it is. The message names the file, the fault and what to do."""

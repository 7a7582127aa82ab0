"""What goes wrong with a model file."""


class ModelFileError(ValueError):
    """A model file that cannot be served as it is. The message names the file, what is wrong and what to do."""

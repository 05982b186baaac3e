"""The error of the model and weight code that callers handle."""


class UnsupportedModelError(ValueError):
    """A model that cannot be served: one sentence says what is wrong and what would be accepted."""

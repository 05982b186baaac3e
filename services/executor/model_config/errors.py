"""The one error a caller of the model and weight code has to know."""


class UnsupportedModelError(ValueError):
    """A model that cannot be served: one sentence says what is wrong and what would be accepted."""

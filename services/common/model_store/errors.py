"""The errors of the model store."""


class ModelStoreError(Exception):
    """A model cannot be found, fetched or trusted; the message is one sentence that says what to do."""


class UnknownModelError(ModelStoreError):
    """A name or path does not belong to a model, so that a retry does not help."""

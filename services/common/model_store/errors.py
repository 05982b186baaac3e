"""The errors of the model store."""


class ModelStoreError(Exception):
    """A model cannot be found, fetched or trusted; the message is one sentence that says what to do."""


class UnknownModelError(ModelStoreError):
    """A name or path is no model's: trying again does not help."""

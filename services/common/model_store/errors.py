"""The one error of the model store."""


class ModelStoreError(Exception):
    """A model cannot be found, fetched or trusted; the message is one sentence that says what to do."""

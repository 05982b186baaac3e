"""Models by name: the catalogue, the Hugging Face Hub, and what is on disk."""

from scalellm.services.common.model_store.catalogue import CATALOGUE, CatalogueModel, Chunk
from scalellm.services.common.model_store.errors import ModelStoreError, UnknownModelError
from scalellm.services.common.model_store.store import (
    ModelEntry,
    ProgressCallback,
    PullProgress,
    list_models,
    name_of,
    pull,
    remove,
    resolve,
)

__all__ = [
    "CATALOGUE",
    "CatalogueModel",
    "Chunk",
    "ModelEntry",
    "ModelStoreError",
    "ProgressCallback",
    "PullProgress",
    "UnknownModelError",
    "list_models",
    "name_of",
    "pull",
    "remove",
    "resolve",
]

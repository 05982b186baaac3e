"""The one implementation of both internal links (tokenizer to scheduler, scheduler to executor)."""

from scalellm.services.common.link.client import LinkClient, LinkHandler
from scalellm.services.common.link.client_frames import (
    LONGEST_NS,
    LOWEST_PRIORITY,
    MAX_SAMPLES,
    check_submit,
    parse_client_frame,
    read_hello,
    tenant_weight,
)
from scalellm.services.common.link.columns import add_tokens, token_runs
from scalellm.services.common.link.dialer import PLAINTEXT, LinkDialer
from scalellm.services.common.link.handles import Handles
from scalellm.services.common.link.identity import ModelIdentity
from scalellm.services.common.link.logprobs import copy_logprobs, cut_logprobs
from scalellm.services.common.link.opening import check_tokenizer, first_frame, lease_of
from scalellm.services.common.link.progress import ProgressError, RequestProgress
from scalellm.services.common.link.registration import link_service_handler
from scalellm.services.common.link.server import ServerLink
from scalellm.services.common.link.traffic import LinkTraffic
from scalellm.services.common.link.version import API_MINOR, MOVES_SINCE

__all__ = [
    "API_MINOR",
    "LONGEST_NS",
    "LOWEST_PRIORITY",
    "MAX_SAMPLES",
    "MOVES_SINCE",
    "PLAINTEXT",
    "Handles",
    "LinkClient",
    "LinkDialer",
    "LinkHandler",
    "LinkTraffic",
    "ModelIdentity",
    "ProgressError",
    "RequestProgress",
    "ServerLink",
    "add_tokens",
    "check_submit",
    "check_tokenizer",
    "copy_logprobs",
    "cut_logprobs",
    "first_frame",
    "lease_of",
    "link_service_handler",
    "parse_client_frame",
    "read_hello",
    "tenant_weight",
    "token_runs",
]

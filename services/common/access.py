"""Access control. Once keys or a link token are configured, a method is denied unless it is listed here."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc

from scalellm.services.common.addresses import is_loopback
from scalellm.services.common.api_keys import DEFAULT_TENANT, Principal, Role, Tenant, digest, read_api_keys
from scalellm.services.common.errors import StatusError
from scalellm.services.common.link_token import read_token
from scalellm.services.common.reload import ConfigFileError, Reloaded
from scalellm.services.common.settings import ServiceSettings

_log = logging.getLogger(__name__)

_EVERYBODY: frozenset[Role] = frozenset()
_CALLERS = frozenset((Role.USER, Role.ADMIN))
_OPERATORS = frozenset((Role.ADMIN, Role.LINK))
_LINKS = frozenset((Role.LINK,))
_ANY_ROLE = frozenset(Role)

METHODS: Mapping[str, frozenset[Role]] = MappingProxyType(
    {
        "/scalellm.v1.Generation/Generate": _CALLERS,
        "/scalellm.v1.Generation/Resume": _CALLERS,
        "/scalellm.v1.Generation/Cancel": _CALLERS,
        "/scalellm.v1.Tokenizer/Encode": _CALLERS,
        "/scalellm.v1.Tokenizer/Decode": _CALLERS,
        "/scalellm.v1.Tokenizer/ApplyChatTemplate": _CALLERS,
        "/scalellm.v1.Tokenizer/GetInfo": _CALLERS,
        "/scalellm.v1.Sessions/Get": _CALLERS,
        "/scalellm.v1.Sessions/List": _CALLERS,
        "/scalellm.v1.Sessions/Fork": _CALLERS,
        "/scalellm.v1.Sessions/Delete": _CALLERS,
        "/scalellm.v1.Scheduler/Connect": _LINKS,
        "/scalellm.v1.Scheduler/GetState": _OPERATORS,
        "/scalellm.v1.Scheduler/Drain": _OPERATORS,
        "/scalellm.v1.Scheduler/AddExecutor": _OPERATORS,
        "/scalellm.v1.Scheduler/RemoveExecutor": _OPERATORS,
        "/scalellm.v1.Executor/Execute": _LINKS,
        "/scalellm.v1.Executor/GetInfo": _OPERATORS,
        "/scalellm.v1.Executor/Drain": _OPERATORS,
        # KEDA sends no key. It reads the same numbers as the metrics, which contain no tenants.
        "/externalscaler.ExternalScaler/IsActive": _EVERYBODY,
        "/externalscaler.ExternalScaler/StreamIsActive": _EVERYBODY,
        "/externalscaler.ExternalScaler/GetMetricSpec": _EVERYBODY,
        "/externalscaler.ExternalScaler/GetMetrics": _EVERYBODY,
        "/externalscaler.ExternalScaler/StreamMetricSpec": _EVERYBODY,
        # Health checks have no secrets.
        "/grpc.health.v1.Health/Check": _EVERYBODY,
        "/grpc.health.v1.Health/Watch": _EVERYBODY,
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": _ANY_ROLE,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ANY_ROLE,
    }
)
"""The roles that may call each gRPC method."""

ROUTES: Mapping[str, frozenset[Role]] = MappingProxyType(
    {
        "POST /v1/chat/completions": _CALLERS,
        "POST /v1/completions": _CALLERS,
        "POST /v1/requests/{request_id}/cancel": _CALLERS,
        "POST /v1/responses": _CALLERS,
        "GET /v1/responses/{response_id}": _CALLERS,
        "DELETE /v1/responses/{response_id}": _CALLERS,
        "POST /v1/responses/{response_id}/cancel": _CALLERS,
        "GET /v1/responses/{response_id}/input_items": _CALLERS,
        "GET /v1/sessions": _CALLERS,
        "GET /v1/sessions/{session_id}": _CALLERS,
        "DELETE /v1/sessions/{session_id}": _CALLERS,
        "POST /v1/sessions/{session_id}/fork": _CALLERS,
        "POST /v1/messages": _CALLERS,
        "POST /v1/messages/count_tokens": _CALLERS,
        "POST /tokenize": _CALLERS,
        "POST /detokenize": _CALLERS,
        "GET /tokenizer_info": _CALLERS,
        "GET /metrics": frozenset((Role.ADMIN,)),
        # Not for users, since the load of all tenants together is not meant for a tenant.
        "GET /v1/fleet": frozenset((Role.ADMIN,)),
        "GET /v1/models": _CALLERS,
        "GET /v1/models/{model}": _CALLERS,
        "GET /version": _CALLERS,
        "GET /health": _EVERYBODY,
        "GET /ping": _EVERYBODY,
        # Pages contain no data; they request it with their user's key.
        "GET /": _EVERYBODY,
        "GET /live": _EVERYBODY,
        "GET /assets/{name}": _EVERYBODY,
    }
)
"""The roles that may call each HTTP route."""

_REFRESH_INTERVAL = 1.0

_STALE_LIMIT = 300.0
"""Seconds for which the last valid keys are accepted after their file is missing or invalid. That is long enough to
repair the file, and limits the use of a key whose removal could not be read."""

Metadata = Iterable[tuple[str, str | bytes]] | None

_principal: ContextVar[Principal | None] = ContextVar("principal", default=None)
"""The caller of the call that the current task serves. Each call has a task of its own."""


class Access:
    """Recognises callers by the secret in their `authorization` metadata: an API key or the link token.

    Args:
        api_keys: File with API keys, checked for changes about once a second.
        link_token_file: File with the link token, checked likewise.
        trusts_certificates: True if, without a link token, a peer with a client certificate may open links.

    Attributes:
        num_refused: Number of refused calls.
    """

    def __init__(
        self, api_keys: Path | None = None, link_token_file: Path | None = None, *, trusts_certificates: bool = False
    ) -> None:
        self._sources: list[Reloaded[Mapping[bytes, Principal]]] = []
        if api_keys is not None:
            self._sources.append(Reloaded((api_keys,), lambda: read_api_keys(api_keys)))
        if link_token_file is not None:
            link = Principal(DEFAULT_TENANT, Role.LINK)
            self._sources.append(Reloaded((link_token_file,), lambda: {digest(read_token(link_token_file)): link}))
        self._links_are_known = trusts_certificates and link_token_file is None
        self._refreshed_at = time.monotonic()
        self.num_refused = 0

    @property
    def is_open(self) -> bool:
        """True if neither keys nor a link token are configured, so that every call is allowed."""
        return not self._sources

    @property
    def interceptors(self) -> tuple[grpc.aio.ServerInterceptor, ...]:
        """Interceptors for a server; none if all methods are open, so that open services pay nothing."""
        return () if self.is_open else (AccessInterceptor(self),)

    @property
    def is_failing(self) -> bool:
        """True while a file of keys cannot be read. The last valid keys stay in use for a while."""
        self._refresh()
        return any(source.failing_since is not None for source in self._sources)

    @property
    def is_stale(self) -> bool:
        """True once a file of keys could not be read for too long, so that no key is accepted any more."""
        self._refresh()
        limit = time.monotonic() - _STALE_LIMIT
        return any(source.failing_since is not None and source.failing_since <= limit for source in self._sources)

    def tenant(self) -> Tenant:
        """Return the tenant of the current call, which `check` has set. Raises StatusError UNAUTHENTICATED if it has
        not.
        """
        if self.is_open:
            return DEFAULT_TENANT
        principal = _principal.get()
        if principal is None:
            raise _unauthenticated("was not looked at in this call")
        return principal.tenant

    def check(self, method: str, metadata: Metadata) -> None:
        """Authenticate the caller of the current call, and authorise the call.

        Raises StatusError UNAUTHENTICATED or PERMISSION_DENIED unless the call is allowed.
        """
        roles = METHODS.get(method, ROUTES.get(method))
        if roles is _EVERYBODY or (roles is _LINKS and self._links_are_known):
            return
        principal = self._identify(metadata)
        if roles is None or principal.role not in roles:
            raise StatusError(
                grpc.StatusCode.PERMISSION_DENIED, f"authorization: {method} is not open to the role {principal.role}"
            )
        _principal.set(principal)

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._refreshed_at >= _REFRESH_INTERVAL:
            self._refreshed_at = now
            for source in self._sources:
                source.refresh()

    def _identify(self, metadata: Metadata) -> Principal:
        if self.is_stale:
            raise StatusError.unavailable(
                f"authorization: the service has not been able to read its keys for {_STALE_LIMIT:g} s", retry_after=5.0
            )
        given = next((value for key, value in metadata or () if key == "authorization"), None)
        if given is None:
            raise _unauthenticated("is missing; send it as metadata: authorization: Bearer KEY")
        scheme, _, secret = given.partition(" ") if isinstance(given, str) else ("", "", "")
        if scheme.lower() != "bearer" or not secret:
            raise _unauthenticated("must be: Bearer KEY")
        wanted = digest(secret)
        for source in self._sources:
            if (principal := source.value.get(wanted)) is not None:
                return principal
        raise _unauthenticated("this key is not known")


class AccessInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls before their handler runs and their messages are parsed.

    Args:
        access: The access control.
    """

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Return the handler of a call, or one that refuses it. Called by gRPC for every call."""
        try:
            self._access.check(handler_call_details.method, handler_call_details.invocation_metadata)
        except StatusError as error:
            self._access.num_refused += 1
            return _refuse_with(error)
        return await continuation(handler_call_details)


def open_access(settings: ServiceSettings, *, serves_links: bool) -> Access:
    """Return the access control that the settings of a service ask for. Raises ConfigFileError.

    Args:
        settings: Settings of the service.
        serves_links: True for an internal service, to which other services open links.
    """
    if not serves_links:
        return Access(settings.api_keys)
    has_certificates = settings.tls_ca is not None
    if settings.api_keys is not None and settings.link_token_file is None and not has_certificates:
        raise ConfigFileError("--api-keys: on this service needs --link-token-file or --tls-ca: links show no API key")
    return Access(settings.api_keys, settings.link_token_file, trusts_certificates=has_certificates)


def warn_if_exposed(settings: ServiceSettings) -> None:
    """Log a warning if a port that other hosts reach is open to everybody, or transmits keys in plaintext."""
    if settings.metrics_port is not None and not is_loopback(settings.metrics_host) and settings.metrics_tls_ca is None:
        _log.warning("metrics on %s are open to everybody who reaches it", settings.metrics_host)
    if is_loopback(settings.host):
        return
    if settings.tls_cert is None and settings.api_keys is None and settings.link_token_file is None:
        _log.warning("%s is open to everybody who reaches it: no TLS, no keys", settings.host)
    elif settings.tls_cert is None:
        _log.warning("on %s keys travel in plain text: no TLS", settings.host)


def _unauthenticated(why: str) -> StatusError:
    return StatusError(grpc.StatusCode.UNAUTHENTICATED, f"authorization: {why}")


def _refuse_with(error: StatusError) -> grpc.RpcMethodHandler:
    """Return a handler that refuses calls of any kind, without waiting for messages or parsing them."""

    async def refuse(_: object, context: grpc.aio.ServicerContext) -> None:
        await error.end(context)

    return grpc.stream_stream_rpc_method_handler(refuse)

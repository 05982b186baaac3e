"""The common handling of all HTTP requests: API keys, drain, limits, errors, metrics and headers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from aiohttp import hdrs, web

from scalellm.services.common.errors import StatusError
from scalellm.services.common.guarded import OnEnd, status_of
from scalellm.services.common.logs import LineLimit
from scalellm.services.tokenizer.call_bytes import CallAccount, CallBytes
from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.http.call import HttpCall
from scalellm.services.tokenizer.http.errors import OPENAI_ERRORS, ErrorFormat, HttpError, error_headers, http_status
from scalellm.services.tokenizer.json_object import JsonObject
from scalellm.services.tokenizer.rpc import CallGate

_JSON = "application/json"
_CALL = web.RequestKey("call", HttpCall)

Handler = Callable[[HttpCall], Awaitable[web.StreamResponse]]
BodyHandler = Callable[[HttpCall, JsonObject, CallAccount], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class HttpFace:
    """Wraps handlers, which raise StatusError for every outcome but an answer, for aiohttp.

    Attributes:
        edge: The worker.
        gate: Closed while the worker drains.
        held: Limits the bytes that calls hold in the worker.
        on_end: Called with each call that ended.
        cors_origins: Origins whose web pages may call; `*`: all.
    """

    edge: Edge
    gate: CallGate
    held: CallBytes
    on_end: OnEnd
    cors_origins: Sequence[str] = ()
    _log_limit: LineLimit = field(default_factory=LineLimit)

    def application(self) -> web.Application:
        """An application without routes."""
        app = web.Application(middlewares=[self._around], client_max_size=0)
        app.on_response_prepare.append(self._on_prepare)
        return app

    def add(
        self,
        app: web.Application,
        method: str,
        path: str,
        handler: Handler,
        errors: ErrorFormat = OPENAI_ERRORS,
        *,
        is_long: bool = False,
    ) -> None:
        """Serve a path by a handler that reads no body. `access.ROUTES` defines who may call it.

        Args:
            app: Application to which it is added.
            method: HTTP method.
            path: Path of the route, names in braces for what differs.
            handler: Answers a call.
            errors: The API's format of errors.
            is_long: True if calls may take long, so that the drain waits for them and admits no new ones.
        """
        # A name in braces matches up to the next slash, unless it has a pattern.
        name = path.split(":")[0] + "}" if ":" in path else path

        async def serve(request: web.Request) -> web.StreamResponse:
            call = HttpCall(request, f"{method} {name}")
            request[_CALL] = call
            return await self._serve(call, waited_for if is_long else handler, errors)

        async def waited_for(call: HttpCall) -> web.StreamResponse:
            with self.gate.running():
                return await handler(call)

        if method == hdrs.METH_GET:
            app.router.add_get(path, serve)  # HEAD as well
        else:
            app.router.add_route(method, path, serve)

    def add_body(
        self, app: web.Application, path: str, handler: BodyHandler, errors: ErrorFormat = OPENAI_ERRORS
    ) -> None:
        """Serve POST of a path by a handler of its JSON body, as a call that the drain waits for."""

        async def read(call: HttpCall) -> web.StreamResponse:
            async with self.held.call(self.edge.access.tenant().name, call.peer) as account:
                if self.gate.is_closed:  # refuse before a long body is read
                    self.gate.enter()
                body = await call.read_json(account, self.edge.limits.max_body_bytes)
                with self.gate.running():
                    return await handler(call, body, account)

        self.add(app, hdrs.METH_POST, path, read, errors)

    async def _serve(self, call: HttpCall, handler: Handler, errors: ErrorFormat) -> web.StreamResponse:
        if (refusal := self._refusal(call)) is not None:
            return _error_response(refusal, errors)
        code = grpc.StatusCode.CANCELLED  # a cancellation passes none of the lines below
        try:
            response = await handler(call)
            code = grpc.StatusCode.OK
            return response
        except ConnectionError:  # the client has gone
            raise
        except Exception as error:
            failure = status_of(error, call.path, self._log_limit)
            code = failure.code
        finally:
            if call.stream is not None and code is grpc.StatusCode.CANCELLED:
                call.stream.abandon()
            self.on_end(call.path, code)
        if call.stream is not None:
            write_error = call.error_event or errors.as_event
            await call.stream.close(write_error(failure))
            return call.stream.response
        return _error_response(failure, errors)

    def _refusal(self, call: HttpCall) -> StatusError | None:
        """Return the error of a call that is not admitted; None if it is."""
        access = self.edge.access
        try:
            if not access.is_open:
                access.check(call.path, call.metadata)
        except StatusError as error:
            access.num_refused += 1
            return error
        return None

    @web.middleware
    async def _around(self, request: web.Request, handler: Callable[..., Any]) -> web.StreamResponse:
        if request.method == hdrs.METH_OPTIONS and self._allowed_origin(request):
            return web.Response(status=204)
        try:
            response: web.StreamResponse = await handler(request)
            return response
        except web.HTTPException as error:  # of the router: no such path, or another method
            what = f"{request.method} {request.path[:256]}: {error.reason.lower()}"
            if error.status == web.HTTPNotFound.status_code:  # mostly of a base URL without /v1, or with it twice
                what += f"; served are {self._served(request)}"
            failure = HttpError(error.status, what, grpc.StatusCode.NOT_FOUND)
            headers = {name: error.headers[name] for name in ("Allow",) if name in error.headers}
            body = OPENAI_ERRORS.body(failure)
            return web.Response(status=error.status, headers=headers, body=body, content_type=_JSON)

    @staticmethod
    def _served(request: web.Request) -> str:
        return ", ".join(sorted({resource.canonical for resource in request.app.router.resources()}))

    async def _on_prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        headers = response.headers
        headers[hdrs.SERVER] = "ScaleLLM"
        call = request.get(_CALL)
        if call is not None:
            headers["x-request-id"] = call.request_id
        if self.gate.is_closed:
            response.force_close()
            headers[hdrs.CONNECTION] = "close"
        if (origin := self._allowed_origin(request)) is None:
            return
        headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
        headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = "*"
        headers[hdrs.VARY] = "Origin"
        if request.method == hdrs.METH_OPTIONS:
            headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = "GET, POST, DELETE"
            headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = request.headers.get(
                hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "authorization, content-type"
            )
            headers[hdrs.ACCESS_CONTROL_MAX_AGE] = "600"

    def _allowed_origin(self, request: web.Request) -> str | None:
        origin = request.headers.get(hdrs.ORIGIN)
        return origin if origin and ("*" in self.cors_origins or origin in self.cors_origins) else None


def _error_response(error: StatusError, errors: ErrorFormat) -> web.Response:
    return web.Response(
        status=http_status(error), headers=error_headers(error), body=errors.body(error), content_type=_JSON
    )

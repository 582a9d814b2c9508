"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ipissa.errors import IpissaError

from .engine.base import (
    AdapterExistsError,
    AdapterInUseError,
    EngineLoadingError,
    OverloadedError,
    UnknownAdapterError,
)
from .schemas import NOT_AN_ALPHA, UNSUPPORTED_FIELD

RETRY_AFTER_SECONDS = "1"
CLIENT_GONE = 499  # as nginx counts clients that hung up


class ClientGoneError(Exception):
    """The client hung up; there is nobody to answer."""


class ApiError(Exception):
    """An error with its HTTP status; `param` is the request field at fault."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def bad_request(message: str, *, param: str | None = None) -> ApiError:
    """400: the request cannot be served as it is."""
    return ApiError(400, message, param=param)


def not_found(message: str, *, param: str | None = None, code: str = "not_found") -> ApiError:
    """404: no such model or adapter."""
    return ApiError(404, message, param=param, code=code)


def error_body(error: ApiError) -> dict[str, object]:
    """The JSON of an error."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def to_api_error(error: Exception) -> ApiError:
    """Any error raised while serving a request, as one with a status."""
    match error:
        case ApiError():
            return error
        case OverloadedError():
            return ApiError(429, str(error), code="overloaded")
        case EngineLoadingError():
            return ApiError(503, str(error), code="loading")
        case AdapterInUseError():
            return ApiError(409, str(error), code="adapter_in_use")
        case AdapterExistsError():
            return ApiError(409, str(error), param="name", code="name_taken")
        case UnknownAdapterError():
            return not_found(str(error), code="adapter_not_found")
        case IpissaError():
            return bad_request(str(error))
        case _:
            return ApiError(500, "The server failed on this request; its log says why.", code="internal_error")


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of the app's own routes an OpenAI error."""

    def respond(error: ApiError) -> JSONResponse:
        headers = {"Retry-After": RETRY_AFTER_SECONDS} if error.status in (429, 503) else None
        return JSONResponse(error_body(error), status_code=error.status, headers=headers)

    @app.exception_handler(ApiError)
    @app.exception_handler(IpissaError)
    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return respond(to_api_error(error))

    @app.exception_handler(ClientGoneError)
    async def on_gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = _describe(error.errors(), request.app.state.settings.max_alpha)
        return respond(bad_request(message, param=param))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            return respond(not_found(f"There is no {request.url.path} here; /docs lists the routes."))
        if error.status_code == 405:
            return respond(
                ApiError(405, f"{request.method} is not possible on {request.url.path}; /docs says what is.")
            )
        return respond(ApiError(error.status_code, str(error.detail)))


def _describe(errors: Sequence[dict], max_alpha: float) -> tuple[str, str | None]:
    """One sentence for the first thing wrong with a request body, and the field it is about."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"The request body is not valid JSON: {first['ctx']['error']}.", None
    path = [str(part) for part in first["loc"] if part != "body"]
    param = path[0] if path else None
    if first["type"] == "missing":
        return f"{'.'.join(path) or 'The request body'} is missing.", param
    if first["type"] == "extra_forbidden":
        return f"{'.'.join(path)} is not a field this server knows; remove it.", param
    if first["type"] == UNSUPPORTED_FIELD:
        return first["msg"], first["ctx"]["field"]
    if first["type"] == NOT_AN_ALPHA:
        return f"{first['msg']}; use a number from {-max_alpha:g} to {max_alpha:g}.", param
    reason = first["msg"].removeprefix("Value error, ")
    return (reason if first["type"] == "value_error" else f"{'.'.join(path) or 'The request body'}: {reason}."), param

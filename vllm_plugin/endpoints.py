"""`POST /v1/load_prefix_adapter` and `/v1/unload_prefix_adapter`: for prefixes what vLLM's endpoints are for LoRA."""

from __future__ import annotations

import os

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from vllm_plugin.models import PrefixModels
from vllm_plugin.store import logger

# Not vLLM's own for LoRA, which refuses several API server processes; and not with VLLM_ in front, since vLLM warns of
# such variables, or refuses to start, if they are not its own.
SWITCH = "PREFIX_SERVE_ALLOW_RUNTIME_UPDATING"

router = APIRouter(dependencies=[Depends(validate_json_request)])


class LoadPrefixAdapterRequest(BaseModel):
    """The body of `/v1/load_prefix_adapter`."""

    prefix_name: str
    prefix_path: str
    load_inplace: bool = False


class UnloadPrefixAdapterRequest(BaseModel):
    """The body of `/v1/unload_prefix_adapter`."""

    prefix_name: str


def attach(app: FastAPI) -> None:
    """Adds the endpoints to a server with prefixes, if the operator switched them on."""
    is_on = os.environ.get(SWITCH, "0").strip().lower() in ("1", "true")
    if not is_on or not getattr(app.state.args, "prefix_registry", None):
        return
    logger.warning(
        "Prefix adapters can be loaded and unloaded at run time by anyone who reaches this server (%s is set): its paths "
        "are read as this process can read them.",
        SWITCH,
    )
    app.include_router(router)


@router.post("/v1/load_prefix_adapter")
async def load_prefix_adapter(request: LoadPrefixAdapterRequest, raw_request: Request) -> Response:
    """Loads an adapter, or, with `load_inplace`, replaces the one of that name."""
    return _response(
        await _models(raw_request).load(request.prefix_name, request.prefix_path, replace=request.load_inplace)
    )


@router.post("/v1/unload_prefix_adapter")
async def unload_prefix_adapter(request: UnloadPrefixAdapterRequest, raw_request: Request) -> Response:
    """Unloads an adapter."""
    return _response(_models(raw_request).unload(request.prefix_name))


def _models(raw_request: Request) -> PrefixModels:
    models: PrefixModels = raw_request.app.state.openai_serving_models.prefix_models
    return models


def _response(result: ErrorResponse | str) -> Response:
    if isinstance(result, ErrorResponse):
        return JSONResponse(content=result.model_dump(), status_code=result.error.code)
    return Response(status_code=200, content=result)

"""`POST /v1/load_prefix_adapter` and `/v1/unload_prefix_adapter`, the counterparts of vLLM's endpoints for LoRA, and `/v1/models`."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import AliasChoices, BaseModel, Field
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from vllm_plugin.front_end import lora_endpoints
from vllm_plugin.front_end.lora_options import SWITCH, VLLM_SWITCH, switches_on
from vllm_plugin.front_end.serving_models import PrefixModels, refusal
from vllm_plugin.logger import logger

router = APIRouter(dependencies=[Depends(validate_json_request)])
# vLLM's endpoints for LoRA, on a server where vLLM itself has none.
lora_router = APIRouter(dependencies=[Depends(validate_json_request)])
models_router = APIRouter()
disabled_router = APIRouter()

# Clients written for LoRA's endpoints send the same fields with `lora_`.
_NAME = Field(validation_alias=AliasChoices("prefix_name", "lora_name"))
_PATH = Field(validation_alias=AliasChoices("prefix_path", "lora_path"))


class LoadPrefixAdapterRequest(BaseModel):
    """The body of `/v1/load_prefix_adapter`."""

    prefix_name: str = _NAME
    prefix_path: str = _PATH
    draft_path: str | None = None
    pinned: bool | None = None
    load_inplace: bool = False


class UnloadPrefixAdapterRequest(BaseModel):
    """The body of `/v1/unload_prefix_adapter`."""

    prefix_name: str = _NAME


def attach(app: FastAPI) -> None:
    """Adds the endpoints to a server with prefixes. If they are disabled, they answer how to enable them."""
    if not getattr(app.state.args, "prefix_registry", None):
        return
    app.include_router(models_router)
    # Before vLLM's own.
    app.router.routes.insert(0, app.router.routes.pop())
    on = switches_on()
    if not on:
        app.include_router(disabled_router)
        return
    logger.warning(
        "Anyone who can reach this server can load and unload prefix adapters (%s is set), from any path that this process "
        "can read.",
        on[0],
    )
    app.include_router(router)
    if VLLM_SWITCH not in on:
        app.include_router(lora_router)


@models_router.get("/v1/models")
async def show_available_models(raw_request: Request) -> Response:
    """Lists the models of vLLM, and the prefixes behind them."""
    models = raw_request.app.state.openai_serving_models
    listed = (await models.show_available_models()).model_dump_json().encode()
    prefixes = getattr(models, "prefix_models", None)
    if prefixes is not None and (cards := await prefixes.cards()):
        # Its list is never empty: the base model is there.
        end = listed.rindex(b"]")
        listed = b"%s,%s%s" % (listed[:end], cards, listed[end:])
    return Response(listed, media_type="application/json")


@router.post("/v1/load_prefix_adapter")
async def load_prefix_adapter(request: LoadPrefixAdapterRequest, raw_request: Request) -> Response:
    """Loads an adapter. With `load_inplace`, replaces an adapter of that name."""
    return _response(
        await _models(raw_request).load(
            request.prefix_name,
            request.prefix_path,
            draft_path=request.draft_path,
            pinned=request.pinned,
            replace=request.load_inplace,
        )
    )


@router.post("/v1/unload_prefix_adapter")
async def unload_prefix_adapter(request: UnloadPrefixAdapterRequest, raw_request: Request) -> Response:
    """Unloads an adapter."""
    return _response(_models(raw_request).unload(request.prefix_name))


@lora_router.post("/v1/load_lora_adapter")
async def load_lora_adapter(request: LoadLoRAAdapterRequest, raw_request: Request) -> Response:
    """Loads a prefix, from a client that loads LoRA adapters."""
    answer = await lora_endpoints.load(request, _models(raw_request))
    if answer is None:
        answer = refusal(
            f"{request.lora_path!r} holds no prefix, and LoRA adapters of this server cannot be loaded at run time; start it with "
            f"{VLLM_SWITCH}=1 in its environment."
        )
    return _response(answer)


@lora_router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(request: UnloadLoRAAdapterRequest, raw_request: Request) -> Response:
    """Unloads a prefix, from a client that unloads LoRA adapters."""
    return _response(_models(raw_request).unload(request.lora_name))


@disabled_router.post("/v1/load_prefix_adapter")
@disabled_router.post("/v1/unload_prefix_adapter")
async def say_how_to_enable() -> Response:
    """Answers both endpoints while they are disabled."""
    return _response(
        refusal(
            f"Prefix adapters of this server cannot be loaded or unloaded at run time; start it with {SWITCH}=1 in its "
            "environment.",
            HTTPStatus.NOT_FOUND,
        )
    )


def _models(raw_request: Request) -> PrefixModels:
    models: PrefixModels = raw_request.app.state.openai_serving_models.prefix_models
    return models


def _response(result: ErrorResponse | str) -> Response:
    if isinstance(result, ErrorResponse):
        return JSONResponse(content=result.model_dump(), status_code=result.error.code)
    return Response(status_code=200, content=result)

"""`GET /v1/models` and `GET /v1/models/{id}`."""

from fastapi import APIRouter, Response

from app.api.answers import Desk, json_response
from app.api.openapi import json_answer
from app.api.schemas import ModelCard, ModelList
from app.requests.served import ServedModel
from app.tenancy.principal import caller


def models_router(desk: Desk) -> APIRouter:
    """The routes over `desk`."""
    router = APIRouter()

    @router.get("/v1/models", openapi_extra=json_answer(ModelList))
    async def list_models() -> Response:
        """Every served model that the caller's key opens."""
        return json_response(
            ModelList([_card(model) for model in desk.models.values() if caller().may_use(model.id)])
        )

    @router.get("/v1/models/{model_id:path}", openapi_extra=json_answer(ModelCard))
    async def retrieve_model(model_id: str) -> Response:
        """One served model."""
        return json_response(_card(desk.model(model_id)))

    return router


def _card(model: ServedModel) -> ModelCard:
    return ModelCard(model.id, model.created, model.max_context_tokens)

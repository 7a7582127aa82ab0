"""`GET /api/admission`: who waits in this gateway, what each tenant was served, and how fairly."""

import msgspec
from fastapi import APIRouter, Response

from app.admission.gate import Gate
from app.api.answers import json_response
from app.api.openapi import json_answer


class TenantShare(msgspec.Struct, frozen=True):
    """`service_tokens`: virtual tokens served since this gateway began: prompt computed and twice the output."""

    tenant: str
    queued: int
    service_tokens: float


class AdmissionView(msgspec.Struct, frozen=True):
    """Of this gateway alone. `fairness_index`: Jain's index of weighted service among the tenants that competed in the
    last minute; null when none did."""

    queued: int
    sequences_released: int
    prompt_tokens_released: int
    fairness_index: float | None
    tenants: list[TenantShare]


def admission_router(gate: Gate) -> APIRouter:
    """The route over `gate`."""
    router = APIRouter()

    @router.get("/api/admission", openapi_extra=json_answer(AdmissionView))
    async def admission() -> Response:
        """The queue now, and tenants by what they were served."""
        now = gate.admission
        queued = now.queued_by_tenant()
        shares = [
            TenantShare(tenant, queued.get(tenant, 0), now.service.get(tenant, 0))
            for tenant in {**now.service, **queued}
        ]
        shares.sort(key=lambda share: (-share.service_tokens, share.tenant))
        return json_response(
            AdmissionView(now.num_queued, now.num_sequences, now.prompt_tokens, now.fairness.index(), shares)
        )

    return router

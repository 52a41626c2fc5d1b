"""GET /v1/usage: what was used, by hour, tenant and model."""

import csv
import io
from dataclasses import astuple, fields
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from serving.errors import not_ready
from serving.tenants.gate import Gate
from serving.tenants.usage import UsageRow
from serving.tenants.visit import Visit


class UsageList(BaseModel):
    object: Literal["list"] = "list"
    data: list[UsageRow]


def usage_router(gate: Gate, responses: dict[int | str, dict[str, Any]]) -> APIRouter:
    router = APIRouter(tags=["usage"])

    @router.get("/v1/usage", response_model=UsageList, responses=responses)
    async def usage(request: Request, format: Literal["json", "csv"] = "json") -> Any:
        """Of the tenant whose key asks; of all tenants for an operator's key (`serving.api_keys`)."""
        visit: Visit = request.state.visit
        try:
            rows = await gate.usage(visit.tenant)
        except ConnectionError:
            raise not_ready("The ledger of usage cannot be reached at the moment.") from None
        return Response(as_csv(rows), media_type="text/csv") if format == "csv" else UsageList(data=rows)

    return router


def as_csv(rows: list[UsageRow]) -> str:
    """With a line of the columns' names."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(UsageRow))
    writer.writerows(map(astuple, rows))
    return text.getvalue()

"""The description of the API in the format of OpenAPI."""

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from s2ft.serve.schemas import ChatRequest, CompletionRequest, LoadRequest, UnloadRequest

PLACE = "#/components/schemas/"
BODIES = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/load_lora_adapter": LoadRequest,
    "/v1/unload_lora_adapter": UnloadRequest,
}
NO_PAGE = (
    "the server has no page at /docs, since such a page loads scripts from another site; GET /openapi.json describes "
    "the API for programs, and the page 'Many adapters' of the documentation for people"
)


def describe(app: FastAPI) -> dict:
    """Return the description of an app.

    Routes read and check their bodies without FastAPI, which therefore does not know them: they are added here.

    Args:
        app: The app.
    """
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, schemas = models_json_schema([(kind, "validation") for kind in BODIES.values()], ref_template=PLACE + "{model}")
    found.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    for path, kind in BODIES.items():
        content = {"application/json": {"schema": {"$ref": PLACE + kind.__name__}}}
        found["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    return found

"""Builds the OpenAPI 3.1 document from operations and the JSON Schemas of their models."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import keylatch
from keylatch_sidecar.api import sendook
from keylatch_sidecar.api.schemas import Body
from keylatch_sidecar.openapi.operation import Operation, describe

Operations = Mapping[str, Mapping[str, Operation]]
"""By path and by method in lower case."""


def build(operations: Operations, permissions: tuple[str, ...]) -> dict[str, Any]:
    """The document.

    Args:
        operations: of the sidecar.
        permissions: that a key may be created with.
    """
    models = list(_models(operations))
    _, schemas = models_json_schema(
        [(model, "serialization") for model in models],
        ref_template="#/components/schemas/{model}",
    )
    content = {
        "openapi": "3.1.0",
        "info": {
            "title": "keylatch sidecar",
            "version": keylatch.__version__,
            "description": "Manages API keys in the dialects of unsent and Sendook, and answers"
            " reverse proxies.",
        },
        "paths": _paths(operations, models),
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas["$defs"],
        },
    }
    # Both dialects have a model `Key`: pydantic qualifies such names with the module's full name.
    text = json.dumps(content).replace("keylatch_sidecar__api__", "")
    document: dict[str, Any] = json.loads(re.sub(r"\b(unsent|sendook)__", r"\1.", text))
    for model in {model for model in models if issubclass(model, Body)}:
        described = document["components"]["schemas"][_name(model, models)]["properties"]
        if "permission" in described:
            described["permission"]["enum"] = list(permissions)
    return document


def _models(operations: Operations) -> Iterator[type[BaseModel]]:
    for methods in operations.values():
        for operation in methods.values():
            for model in (operation.response, operation.body, operation.error):
                if model is not None:
                    yield model
    yield sendook.FieldErrors


def _paths(operations: Operations, models: list[type[BaseModel]]) -> dict[str, Any]:
    def reference(model: type[BaseModel]) -> dict[str, Any]:
        return {"$ref": f"#/components/schemas/{_name(model, models)}"}

    return {
        path: {
            method: describe(path, method, operation, reference)
            for method, operation in methods.items()
        }
        for path, methods in operations.items()
    }


def _name(model: type[BaseModel], models: list[type[BaseModel]]) -> str:
    dialect = model.__module__.rpartition(".")[2]
    is_ambiguous = any(other is not model for other in models if other.__name__ == model.__name__)
    return f"{dialect}.{model.__name__}" if is_ambiguous else model.__name__

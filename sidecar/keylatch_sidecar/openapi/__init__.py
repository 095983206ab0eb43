"""The OpenAPI document of the sidecar, generated from the models that read and write bodies."""

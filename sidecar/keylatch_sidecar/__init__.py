"""The keylatch sidecar: an HTTP API that manages keys, and forward auth for reverse proxies."""

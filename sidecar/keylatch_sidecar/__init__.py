"""The keylatch sidecar: manages keys in two dialects and answers proxies' verify calls."""

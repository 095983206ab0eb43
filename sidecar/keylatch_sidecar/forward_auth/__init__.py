"""What reverse proxies ask: may this request pass? Over HTTP, and over gRPC."""

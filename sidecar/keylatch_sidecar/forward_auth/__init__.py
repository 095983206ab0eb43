"""Forward auth for reverse proxies: decides on their requests, over HTTP and over gRPC."""

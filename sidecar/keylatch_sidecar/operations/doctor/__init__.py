"""What `keylatch doctor` looks at: settings, host, store and Redis. It changes nothing anywhere."""

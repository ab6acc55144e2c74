"""Which node a session belongs on."""

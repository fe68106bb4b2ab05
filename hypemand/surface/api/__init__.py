"""What the doors serve: the HTTP API, its description, and what the commands ask."""

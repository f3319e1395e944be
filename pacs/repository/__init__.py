"""SQL behind the services' Protocols."""

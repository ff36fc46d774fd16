"""Keepwarm: a self-hosted LLM API server whose main feature is context caching."""

__version__ = "0.1.0"

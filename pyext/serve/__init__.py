"""Serving many adapters at once: the pool that holds them, and a model that runs on it."""

from fusedpeft.serve.pool import AdapterPool

__all__ = ["AdapterPool"]

"""Measuring a cache against the full one: fidelity, passkey retrieval, methods to compare with."""

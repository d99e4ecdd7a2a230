"""Captured graphs made runnable: torch.compile's backend, pieces, replay."""

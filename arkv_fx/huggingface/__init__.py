"""transformers models over an ARKV cache: attention, layers, caches."""

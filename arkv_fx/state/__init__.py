"""The cache's tensors: views by name, allocation, and sessions that own them."""

"""What layers lose, and what their attention is like: read while a prompt passes through."""

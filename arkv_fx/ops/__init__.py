"""What a step does: attention over the state, and the moves of tokens between its tiers."""

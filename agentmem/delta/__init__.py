"""The mechanism in a model: one layer, many layers, and the call (state, tokens) -> (state', logits)."""

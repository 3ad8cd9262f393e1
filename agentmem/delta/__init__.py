"""Delta-mem inside a model: memory of one layer, of all layers, and the call (state, tokens) -> (state', logits)."""

"""Training: one loop (`loop`), a base model from conversations (`pretrain`), memory from replies (`adapter`)."""

"""Recipes for memory and retrieval together, and the table that compares them. See docs/examples/hybrid_rag.md."""

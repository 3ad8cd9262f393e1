"""A coding assistant that keeps what its developer said when the conversation is gone.

See docs/examples/coding_assistant.md.
"""

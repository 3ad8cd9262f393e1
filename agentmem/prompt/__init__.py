"""Messages to tokens, which message each token belongs to, and which messages a prompt shows."""

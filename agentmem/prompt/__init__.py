"""Turns messages into tokens, finds the message that each token belongs to, and chooses what a prompt shows."""

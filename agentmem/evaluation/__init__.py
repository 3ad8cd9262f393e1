"""Measures memory with controls: facts are stated and asked for, and every score is compared with that of no memory."""

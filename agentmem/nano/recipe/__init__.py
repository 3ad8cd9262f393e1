"""How the embedded model is made: its language, curriculum and training."""

"""How the embedded model is made: its language, its curriculum, its training."""

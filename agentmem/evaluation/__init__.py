"""Memory measured with controls: what was told is asked back, and every gain stands beside what no memory gives."""

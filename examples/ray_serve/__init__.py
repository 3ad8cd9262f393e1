"""`agentmem serve` as a deployment of Ray Serve, with its threads in PostgreSQL. See docs/howto/ray_serve.md."""

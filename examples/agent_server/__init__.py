"""A graph for LangGraph's Agent Server, with its threads in SQL. See docs/howto/agent_server.md."""

"""An analysis agent: definitions told once steer its queries in later sessions, and results are facts with sources.

See docs/examples/analysis_agent.md.
"""

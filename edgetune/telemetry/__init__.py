"""What the board and the process report: one file per source.

This room may know the bundle, the errors and what the system reports; it must not know plans, engines or the agent.
"""

"""Run a bundle: one file per runtime, imported lazily; session.py is what trains, whatever the runtime."""

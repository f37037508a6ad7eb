"""The agent as a service: states, what service managers and monitors are told of them, and when training yields.

Nothing of training is known here, and nothing is imported by the package itself.
"""

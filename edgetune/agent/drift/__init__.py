"""Drift: notices that the world has changed, and when nothing changes at all."""

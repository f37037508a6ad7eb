"""Does the world change? Detectors on numbers that every step measures, and what is done about what they find.

Pure arithmetic; nothing is imported by the package itself.
"""

"""Pure functions of shapes and bytes: how long tensors live, what a graph needs at its peak, which plan fits a budget.

This room may know the bundle, the codecs' byte counts and the errors; it must not know an engine, a runtime, a device
or the values of any tensor beyond the eigenvalues and bases of a calibration.
"""

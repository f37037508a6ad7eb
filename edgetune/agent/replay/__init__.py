"""Replay: samples that were trained before, mixed into the batches of today so that they are not forgotten."""

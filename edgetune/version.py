"""The version of EdgeTune, and nothing else."""

__version__ = "0.1.0"

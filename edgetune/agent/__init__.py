"""The agent: what runs on the device day and night. It takes samples in, trains, and loses nothing.

Entry point: :func:`edgetune.agent.loop.run_agent`. This package may import bundle, errors, units, codecs, planning,
engines (lazily) and telemetry; never torch, onnx or the export room. It imports nothing by itself, so that reading a
state directory (``edgetune status``) stays light.
"""

"""The named actor that owns a run, and what it builds and supervises.

Read controller.py, context.py (what it shares with kinds/), kinds/ and workers.py, then recovery.py, controller_start.py,
owner.py, scaler.py, colocated.py, notices.py and ray_metrics.py.

Imports every room of `actors`.
"""

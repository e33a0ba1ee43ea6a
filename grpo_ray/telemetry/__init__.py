"""Telemetry of a run: metrics, events, time spans, and where they are written.

Read metrics.py (typed reports -> names and numbers; catalogue.py: the names), measures.py (pass@k, cons@k), events.py,
tracking.py; then activity.py, timeline.py, trace_file.py and advice.py (where the time goes), messages.py, sample_figures.py
and prometheus.py.

Imports `config` and the modules at the root of `grpo_ray`.
"""

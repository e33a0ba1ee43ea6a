"""The report of a run: report.html, one self-contained file.

Read page.py, then charts.py and timeline.py; template.html is the page.

Imports `run`, `telemetry`, `config` and the modules at the root of `grpo_ray`.
"""

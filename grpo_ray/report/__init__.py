"""report.html: what a run did, in one file that stands alone.

Read page.py, then charts.py and timeline.py; template.html is the page.

Imports `run`, `telemetry`, `config` and the modules at the root of `grpo_ray`.
"""

"""Runs on a cluster, seen from outside: `submit`, `status`, `logs`, `scale` and `stop`.

Read submit.py, package.py and shipped.py (what is uploaded), dashboard.py with bounded_requests.py (the cluster's state),
in_cluster.py (what runs on its head).

Imports `launch.run` and the modules at the root of `launch`.
"""

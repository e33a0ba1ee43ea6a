"""The command line: from a recipe to a run, on this machine or on a cluster.

Read cli.py with cli_cluster.py and cli_options.py, then run/, check/, pipeline/ and cluster/; the other modules here serve them.

Imports `actors` and `grpo_ray`.
"""

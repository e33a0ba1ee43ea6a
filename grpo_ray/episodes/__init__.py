"""Episodes: conversations of several turns, token by token. Ids go in and come out; what a model wrote is never tokenized again.

Read contract.py (what users write), instances.py (one environment, as an episode sees it), described.py (which there are), calls.py
(tool calls in what a model writes), suffix.py (the ids of what an environment says between two turns) with templates.py (chat
templates that write every turn as it was sampled), and episode.py (the turns).

This package imports `config`, `data`, `user_code` and the modules at the root of `grpo_ray`.
"""

"""Environment workers: users' environments in processes that can be killed, one instance for each live episode.

Read messages.py and child.py (what runs in a process) with process.py (the parent's end), hosts.py (all processes of a worker, and
who holds which instance), actor.py (one worker), worker.py and pool.py (all workers), and client.py (the sampler's end).

Imports the modules at the root of `actors`, and the processes of `reward`.
"""

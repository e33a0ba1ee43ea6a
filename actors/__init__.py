"""The Ray actors of a run, and the controller that owns it.

Read control/ first, then rollout/, reward/, learner/ and weights/; supervise.py restarts workers, and cluster.py with
placement_defaults.py places them. The other modules here serve every actor.

Imports `grpo_ray`.
"""

"""The training, evaluation and sampling loops, written against the Protocols of roles.py, without Ray, vLLM or DeepSpeed.

Read roles.py and train_loop.py with collect.py and session.py, group_rollout.py and immediate_future.py (a group is sampled and
scored), overlap.py (finished groups go to the learner at once) and stops.py (what ends a completion); then sft_loop.py with
supervised.py, evaluate.py and sampling.py.

Imports every room of `grpo_ray` but `pipeline`, `report`, `datagen` and `tasks`.
"""

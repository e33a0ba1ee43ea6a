"""Learner ranks: DeepSpeed engines that take the same batch and share its micro-batches.

Read group.py (all ranks as one `Learner`), actor.py (one rank), micro_batches.py, accumulation.py, build.py (config -> engine,
with optimizer.py, shards.py and deepspeed_schema.py); then critic.py, kl.py, sequence.py, reference.py and offload.py, and
state.py with zero_state.py (checkpoints).

Imports `actors.weights` and the modules at the root of `actors`.
"""

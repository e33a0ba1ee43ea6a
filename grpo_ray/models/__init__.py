"""Models in torch: those that are trained, what is known of a model before it is loaded, and what a run holds in memory.

Read policy.py (packed micro-batch -> log-probabilities) with attention.py, logprobs.py and linear.py, then value.py (PPO's critic)
and reward.py; features/ holds what some families do and others do not. plain.py is the path of models that do not pack, and checks/
compares either with a model's own forward. lora.py and named_weights.py change or read a loaded model. files/ and trainable.py
prepare or inspect one before; memory/ and flops.py compute its costs. attention.py goes through varlen.py on GPUs; cuda.py says
whether they can be used, compiled.py compiles layers.

This package imports `config`, `batch` and the modules at the root of `grpo_ray`.
"""

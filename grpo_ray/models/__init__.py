"""Models in torch: those that are trained, what is known of a model before it is loaded, and what a run holds in memory.

Read policy.py (packed micro-batch -> log-probabilities) with attention.py, logprobs.py and linear.py, then value.py (PPO's
critic) and reward.py; lora.py, named_weights.py and dropout.py change or read a loaded model. loading.py, model_files.py,
tiny.py and trainable.py prepare or inspect one before; memory.py, memory_fit.py, kv_cache.py and flops.py compute its costs.

This package imports `config`, `batch` and the modules at the root of `grpo_ray`.
"""

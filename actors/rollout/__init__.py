"""Rollout engines: vLLM as Ray actors, and all of them as one `Sampler`.

Read pool.py with requests.py, balance.py, poison.py, lives.py and engine.py (what the pool knows of one), then actor.py (one
engine) with vllm_options.py and sample.py; scheduler.py and forked_core.py are inside vLLM, adapters.py holds LoRA adapters.

Imports `actors.weights` and the modules at the root of `actors`.
"""

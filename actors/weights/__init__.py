"""Weight synchronization, from the learner ranks to the rollout engines, on vLLM's own weight-transfer API.

Read protocol.py, sync.py (the controller's side), sender.py (a learner rank's), then gloo_trainer.py, gloo_engine.py,
gloo_group.py, buckets.py, memory.py and shadow.py (CPUs, and the engines' side), gpu.py with leaving.py (nccl, ipc) and backend.py,
which makes all of them known to vLLM; adapter_sync.py sends LoRA adapters alone.

Imports the modules at the root of `actors`.
"""


def register() -> None:
    """Register the backends; vLLM calls this in each of its processes (entry point `vllm.general_plugins`)."""
    from actors.runtime import end_with_parent
    from actors.weights import backend as weight_backend

    weight_backend.register()
    end_with_parent()

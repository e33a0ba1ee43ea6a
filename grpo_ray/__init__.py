"""GRPO training without Ray, vLLM or DeepSpeed, which `actors` adds.

Read types.py, then loop/, algorithm/ and batch/. Only entry.py imports `actors` and `launch`, by name.
"""

"""A model as a folder of files: reading what it says of itself, checking that its tensors are whole, and making a tiny one.

Read loading.py (config and tokenizer) first, then model_files.py and checkpoint_tensors.py; tiny.py makes random models, with the
tokenizer of tiny_tokenizer.py. This room imports `config` and the modules at the root of `grpo_ray`.
"""

"""One file a kind of run, a function each, which the controller calls by kind.

Read grpo.py, then supervised.py, evaluate.py, sample.py and replay.py; inputs.py reads model and prompts, training.py is the
loop from restore to end.
"""

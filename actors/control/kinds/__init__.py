"""The kinds of run: a file and a function for each, which the controller calls by kind.

Read grpo.py, then supervised.py, evaluate.py, sample.py and replay.py; inputs.py reads model and prompts, training.py is the
loop from restore to end.
"""

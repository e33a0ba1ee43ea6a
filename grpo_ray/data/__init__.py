"""Data sets: from rows to prompts, demonstrations and pairs, as token ids.

Read sources.py (files, hubs, generators -> a table of rows), templates.py (a row -> text) with turns.py and thinking.py (the end
and the beginning of an answer), tokenized.py, then prompts.py and preferences.py; cursor.py iterates over them and resumes exactly,
epochs.py computes the number of steps, decontaminate.py finds the rows that share words with a test set.

This package imports `config`, `user_code` and the modules at the root of `grpo_ray`.
"""

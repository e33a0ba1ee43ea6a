"""From rows to prompts, demonstrations and pairs, as token ids.

Read sources.py (files, hubs, generators -> a table of rows), templates.py (a row -> text) with turns.py and thinking.py (how an
answer ends and begins), tokenized.py, then prompts.py and preferences.py; cursor.py walks over them and resumes exactly,
epochs.py says how many steps they make, decontaminate.py which rows share words with a test set.

Imports `config`, `user_code` and the modules at the root of `grpo_ray`.
"""

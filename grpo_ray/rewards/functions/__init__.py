"""Reward functions in general: the contract, where a recipe's own are found, and how they are called.

Read function.py, then scoring.py and logs.py; by_path.py, by_source.py, made.py, verl.py and files.py are about functions of
recipes.
"""

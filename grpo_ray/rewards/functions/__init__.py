"""Reward functions in general: the contract, where a recipe's own functions are found, and how they are called.

Read function.py, then scoring.py and logs.py; by_path.py, by_source.py, made.py, verl.py and files.py handle the functions of
recipes.
"""

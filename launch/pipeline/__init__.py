"""`grpo-ray pipeline`, and the commands that create data: the stages of a recipe, one after the other.

Read stages.py, view.py and stage_data.py; judge_pairs.py and decontaminate.py are commands of their own.

Imports `launch.run` and the modules at the root of `launch`.
"""

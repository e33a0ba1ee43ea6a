"""From a recipe to a finished run: the commands `train`, `sft`, `eval`, `resume` and similar ones.

Read recipe.py, jobs.py (what the commands do), follow.py and live.py (start a controller and follow it); preflight.py with
machine.py, hub.py, effects.py and foreign_code.py is what takes no time and should fail first; placement.py fits workers to
what there is, resumed.py, code_folder.py and left.py are about going on, smoke.py is the main job, and pretrained.py
(with pretrained_model.py, gguf.py and tree_memory.py) the same of a model that others have trained.

Imports the modules at the root of `launch`.
"""

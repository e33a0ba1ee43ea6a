"""Stages as a graph, each with what it needs, what it leaves, and a gate: DeepSeek-R1's recipe as one program.

    config.py   the schema of a pipeline's recipe        plan.py     stages in order, references resolved
    kinds.py    what kinds of stages there are           record.py   pipeline.json: what is done, with checksums
    measure.py  a model's figures on held-out prompts    gates.py    may it go on?
    estimate.py tokens and time, before they are spent   report.py   report.html of the whole

`launch/pipeline/stages.py` runs it.
"""

"""Pipelines: a graph of stages with inputs, outputs and gates, e.g. DeepSeek-R1's recipe as one program.

    config.py   the schema of a pipeline's recipe        plan.py     stages in order, references resolved
    kinds.py    the kinds of stages                      record.py   pipeline.json: finished stages, with checksums
    measure.py  a model's figures on held-out prompts    gates.py    conditions to go on
    estimate.py expected tokens and time                 report.py   report.html of the pipeline

`launch/pipeline/stages.py` runs it.
"""

"""Filters of sampled answers for training data: right, readable, well-formed, and without duplicates.

    samples -> judge (filters/trace.py) -> select (filters/select.py) -> mix (filters/mix.py) -> rows for SFT

The filters are those of DeepSeek-R1's cold start and rejection sampling (2501.12948, sections 2.3.1 and 2.3.3): right
answers only; no mixed languages, no long paragraphs, no code blocks in the reasoning, no repetition.
"""

"""Where the answer of a completion is, and what it means.

Read answer_tag.py and parts.py; then, of mathematics, golds.py, readings.py, plain_numbers.py and answer_text.py. cpu_clock.py
ends what computes for too long.
"""

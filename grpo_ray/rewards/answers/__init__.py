"""Locating the answer in a completion, and interpreting it.

Read answer_tag.py and parts.py; then, for mathematics, golds.py, readings.py, plain_numbers.py and answer_text.py. cpu_clock.py
stops computations that take too long.
"""

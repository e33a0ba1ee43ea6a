"""Models behind an HTTP endpoint that are asked what an answer is worth.

Read judge_client.py, then judge_form.py (what a judge is shown) and http_client.py (a bound on what is read of an answer).
"""

"""Models behind an HTTP endpoint that rate answers.

Read judge_client.py, then judge_form.py (what a judge sees) and http_client.py (a limit on what is read of a response).
"""

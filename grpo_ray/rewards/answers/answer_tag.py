"""The answer between tags in a completion."""

from __future__ import annotations

import re

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def answer_of(text: str) -> str:
    """The content of the last `<answer>...</answer>`, else the whole text; stripped."""
    # Each unclosed tag would be read to the end of the text.
    found = _ANSWER.findall(text, 0, text.rfind("</answer>") + len("</answer>"))
    return (found[-1] if found else text).strip()

"""Where the answer of a completion is."""

from __future__ import annotations

import re

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def answer_of(text: str) -> str:
    """What the last `<answer>...</answer>` holds, else the whole text; stripped."""
    # Tags that nothing closes would each be read to the end of the text.
    found = _ANSWER.findall(text, 0, text.rfind("</answer>") + len("</answer>"))
    return (found[-1] if found else text).strip()

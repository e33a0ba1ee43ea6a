# ruff: noqa: RUF001 (other scripts are the matter of some tests)
r"""`accuracy`: which answers are right for a gold answer, for all types that data hold golds in, and how texts give answers."""

from __future__ import annotations

import datetime
import math
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sympy

from grpo_ray.config.data import DataSource
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.data.sources import load_table
from grpo_ray.errors import RewardError
from grpo_ray.rewards.accuracy import accuracy
from grpo_ray.rewards.answers import readings
from grpo_ray.rewards.answers.answer_text import ends_in_a_cut_box
from grpo_ray.rewards.answers.cpu_clock import OutOfTimeError, within_cpu_s
from grpo_ray.rewards.answers.golds import _numbers, leading_choice, read_gold, said_words
from grpo_ray.rewards.answers.plain_numbers import _symbol
from grpo_ray.rewards.functions.function import ScoreInputs
from grpo_ray.rewards.functions.scoring import call_reward
from grpo_ray.rewards.table import resolve
from grpo_ray.types import ScoreStatus
from tests.cpu_time import cpu_below

NO = None
"""Not applicable: the gold is not understood."""


def score(gold: Any, completion: str, timeout_s: float = 3) -> float | None:
    (value,) = accuracy([completion], answer=[gold], timeout_s=timeout_s)
    assert not isinstance(value, RewardError), value
    return value


# Where an answer stands: gold, completion, value.
PLACES: list[tuple[Any, str, float | None]] = [
    (72, "**72**", 1),
    (72, "__72__", 1),
    (72, "***72***", 1),
    (72, "*72*", 1),
    (72, "The answer is **72**.", 1),
    (72, "**The answer is 72.**", 1),
    (72, "**Answer:** 72", 1),
    (72, "**Answer: 72**", 1),
    (72, "### Final Answer\n\n72", 1),
    (72, "### Final Answer\n**72**", 1),
    (72, "Answer:\n\n$$72$$", 1),
    (72, "`72`", 1),
    (72, "```\n72\n```", 1),
    (72, "The answer is `72`.", 1),
    (72, "48 + 24 = 72.", 1),
    (72, "48 + 24 = 72 clips", 1),
    (72, "So 48 + 24 = **72** clips.", 1),
    (72, "$48 + 24 = 72$", 1),
    (72, r"\[48 + 24 = 72\]", 1),
    (72, r"\boxed{48 + 24 = 72}", 1),
    (72, r"\boxed{x = 72}", 1),
    (72, r"\boxed{72 \text{ clips}}", 1),
    (72, r"\boxed{72 clips}", 1),
    (72, r"\boxed{\text{72 clips}}", 1),
    (72, r"\boxed{\mathbf{72}}", 1),
    (72, r"\boxed{\$72}", 1),
    (72, r"\boxed{$72$}", 1),
    (72, r"$\boxed{72}$", 1),
    (72, r"\fbox{72}", 1),
    (72, r"\boxed 72", 1),
    (72, r"\boxed{\boxed{72}}", 1),
    (72, r"\boxed{72}. I will put it in \boxed{}.", 1),
    (72, "$$72$$", 1),
    (72, "$$\n72\n$$", 1),
    (72, r"\(72\)", 1),
    (72, r"\[72\]", 1),
    (72, "\\[\n72\n\\]", 1),
    (72, r"The answer is \(72\).", 1),
    (72, "The answer is $72$.", 1),
    (72, "The answer is $72.", 1),
    (72, "The answer is 72 because 48 + 24 is 72, with 2 steps.", 1),
    (72, "The answer is 72!", 1),
    (72, "The final answer is: 72. I hope it is correct.", 1),
    (72, "The answer to the question of how many clips is 72.", 1),
    (72, "The answer is 71. Wait, no: the answer is 72.", 1),
    (71, "The answer is 71. Wait, no: the answer is 72.", 0),
    (72, "The answer is not 71. It is 72.", 1),
    (72, "The answer is not 72.", 0),
    (72, "The answer isn't 72 but 71.", 0),
    (72, "The answer is 72. I hope this answer helps!", 1),
    (72, '{"answer": 72}', 1),
    (72, "She has 72.", 1),
    (72, "Tom has 72", 1),
    (72, "I got 72.", 1),
    (72, "I get 72", 1),
    (72, "Sum: 72", 1),
    (72, "n: 72", 1),
    (72, r"\boxed{Answer: 72}", 1),
    (72, r"\boxed{\text{Answer: }72}", 1),
    (72, r"\text{Answer: } 72", 1),
    (72, "_72_", 1),
    (72, "72!", 1),
    (72, "48 + 24 = 72!", 1),
    (72, "72 ✓", 1),
    ("2\\pi", "∴ 2\\pi", 1),
    ("x > 3", "→ x > 3", 1),
    ("(1, 2)", "#### (1, 2)", 1),
    ("10!", "10!", 1),
    ("10!", "10", 0),
    ("3 mod 7", "3 mod 7", 1),
    ("Jan 5", "5", NO),
    (72, "#### 72", 1),
    (72, "#### **72**", 1),
    (72, "#### $72$", 1),
    (72, "so\n#### 72\n", 1),
    ("#### 72", "#### Step 3\n48 + 24 = 72", 1),
    ("#### 3", "#### Step 3\n48 + 24 = 72", 0),
    (3, "#### Step 3\nThe answer is 72.", 0),
    (72, "<answer>72</answer>", 1),
    (72, "<answer>**72**</answer>", 1),
    (72, "<answer>\\boxed{72}</answer>", 1),
    (72, "<answer>The answer is 72.</answer>", 1),
    (72, "<think>71</think><answer>72", 1),
    (72, "<think>72</think><answer>71</answer>", 0),
    (72, "<think>72</think>", 0),
    (72, "<answer>71</answer><answer>72</answer>", 1),
    (72, "72<|im_end|>", 1),
    (72, "<b>72</b>", 1),
    (72, "Die Antwort ist 72.", 1),
    (72, "答案是72。", 1),
    (72, "答案：７２", 1),
    (72, "La respuesta es **72**.", 1),
    (72, "Natalia sold 48/2 = 24 clips in May and 72 in all.", 1),
    (72, r"\boxed{71} no wait \boxed{72}", 1),
    (71, r"\boxed{71} no wait \boxed{72}", 0),
    (72, r"\boxed{72} no wait \boxed{71}", 0),
    (72, r"\boxed{72} and not 71", 1),
    (72, r"\boxed{71} \boxed{72}", 1),
    (72, r"\boxed{72}\nThe answer is 71.", 1),
    (72, r"72 is the sum, but \boxed{71}", 0),
    (72, r"\boxed{7", 0),
    (7, r"The answer is \boxed{7", 0),
    ("C", r"\boxed{C", 0),
    (72, r"\boxed{9^{9^{9}}} 72", 0),
    (72, "172", 0),
    (72, "7.2", 0),
    (72, "0.72", 0),
    (72, "-72", 0),
    (72, "72.5", 0),
    (72, "72/5", 0),
    (72, "720", 0),
    (72, "I don't know.", 0),
    (72, "", 0),
]

# One value, several, or none: what a list of answers is worth.
LISTED: list[tuple[Any, str, float | None]] = [
    (12, "12 or 13", 0),
    (13, "12 or 13", 0),
    (12, "12, 13", 0),
    (13, "12, 13", 0),
    (13, "The answer is 12 or 13.", 0),
    (13, "The answer is 12 and 13.", 0),
    (13, "So it is 12 or 13.", 0),
    (13, r"\boxed{12 \text{ or } 13}", 0),
    (13, r"\boxed{12, 13}", 0),
    (13, r"\boxed{12}, \boxed{13}", 0),
    (13, r"$\boxed{12}$ or $\boxed{13}$", 0),
    (13, r"\boxed{\{12, 13\}}", 0),
    (13, "<answer>12 13</answer>", 0),
    (13, "<answer>11 12 13 14 15</answer>", 0),
    (13, ", ".join(str(n) for n in range(100)), 0),
    (13, r"\boxed{" + ", ".join(str(n) for n in range(100)) + "}", 0),
    (12, "12 or 12", 1),
    ("12 or 13", "12 or 13", 1),
    ("12 or 13", "13, 12", 1),
    ("12 or 13", r"\boxed{12} and \boxed{13}", 1),
    ("12 or 13", "12", 0),
    ("12 or 13", "12, 13, 14", 0),
    ("12, 13", "The answers are 12 and 13.", 1),
    ("12, 13", "So x is 12 or 13.", 1),
    ("1,2", "1, 2", 1),
    ("1,2", "1,2", 1),
    ("1,2", "2 and 1", 1),
    ("1,2", "(1,2)", 1),
    ("1,2", r"\{1, 2\}", 1),
    ("1,2", "1.2", 0),
    ("1,2", "12", 0),
    ("1,2", "1", 0),
    (1.2, "1.2", 1),
    ("1,2,3", "3, 2, 1", 1),
    ("1, 2, and 3", "1, 2, 3", 1),
    ("1,234", "1234", 1),
    ("1234", "1,234", 1),
    ("1,234, 5,678", "1234 and 5678", 1),
    ("-1, 2", "2, -1", 1),
    ("-1, 2", "1, 2", 0),
    ("x=1 or x=2", "x = 2, x = 1", 1),
    ("x=1 or x=2", "The answer is x = 1 or x = 2.", 1),
    ("x=1 or x=2", "1, 2", 1),
    ("x=1 or x=2", "x=1", 0),
    ("1, 2", r"x = 1 \text{ or } x = 2", 1),
    (1, "x=1 or x=2", 0),
    ("x=1, y=2", "x=1, y=2", 1),
    ("x=1, y=2", "x=2, y=1", 0),
    (r"\pm 2", r"\boxed{2, -2}", 1),
    ("2, -2", r"\boxed{x = \pm 2}", 1),
    (2, r"\boxed{\pm 2}", 0),
    (r"\frac{1}{2}, \frac{1}{3}", "1/3 and 1/2", 1),
    (r"\frac{1}{2}, \frac{1}{3}", r"The answer is $\frac12$ and $\frac13$.", 1),
    ("(1, 2)", "(1,2)", 1),
    ("(1, 2)", "(2, 1)", 0),
    ("(2, 1)", "(2,1)", 1),
    ("(2, 1)", "(1,2)", 0),
    ("(1, 2, 3)", "(1,2,3)", 1),
    ("(3,4]", "(3, 4]", 1),
    ("(3,4]", "[3, 4)", 0),
    (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2)\cup(3,\infty)", 1),
    (r"(-\infty, 2) \cup (3, \infty)", "(-∞, 2) ∪ (3, ∞)", 1),
    (["12", "34"], "12", 1),
    (["12", "34"], "The answer is 34.", 1),
    (["12", "34"], "34, 12", 1),
    (["12", "34"], "12, 35", 0),
    (["12", "34"], "13", 0),
    (["12", "34"], "12.34", 0),
    (["12", "34"], "1234", 0),
    (("12", "34"), "34", 1),
    ([12, 34], r"\boxed{34}", 1),
    ([12], "12", 1),
    (["1/2", "0.5"], "0.5", 1),
    (np.array([12, 34]), "34", 1),
    (np.array(["12", "34"]), "35", 0),
    ([["12"]], "12", 1),
    ([["12", "13"], ["14"]], "12", NO),
    (["#### 12"], "#### 12", 1),
    (["2,4"], "4 and 2", 1),
    (["2,4"], "2", 0),
    (["", "12"], "12", 1),
    ([None, "12"], "12", 1),
    (["Paris", "12"], "12", NO),
    (["A", "C"], "The answer is C.", 1),
    (["A", "C"], "The answer is A and C.", 1),
    (["A", "C"], "The answer is B.", 0),
    ('["12", "34"]', "34", 1),
    ("['12', '34']", "34", 1),
    ('["12"]', "13", 0),
    ('["12', "12", NO),
    ([], "12", NO),
    ([""], "12", NO),
    ([None], "12", NO),
    ([[]], "12", NO),
    ("[]", "12", NO),
    ({}, "12", NO),
    ({"value": 12}, "12", NO),
]

# Numbers as JSON and Parquet hold them, and as people write them.
NUMBERS: list[tuple[Any, str, float | None]] = [
    (6, "6", 1),
    ("6", "6.0", 1),
    (72.0, "72", 1),
    ("72.00", "72", 1),
    ("072", "72", 1),
    ("+72", "72", 1),
    (Decimal("72.50"), "72.5", 1),
    (Decimal("1E+3"), "1000", 1),
    (Decimal("NaN"), "1", NO),
    (Fraction(1, 3), "1/3", 1),
    (np.int64(72), "72", 1),
    (np.float64(0.1), "0.1", 1),
    (np.float32(0.1), "0.1", 1),
    (float(np.float32(0.1)), "0.1", 1),
    (float(np.float32(1234567.9)), "1234567.9", 1),
    (float(np.float32(1234567.9)), "1234568", 0),
    (np.float32("nan"), "0", NO),
    (np.bool_(True), "1", NO),
    (1e-05, "0.00001", 1),
    (1e-05, "1e-5", 1),
    (1e-05, r"\boxed{10^{-5}}", 1),
    (1e-05, r"$1 \times 10^{-5}$", 1),
    (1e-05, "0.0001", 0),
    (1e-05, "0", 0),
    (1e-05, "-5", 0),
    (1e-08, "3e-8", 0),
    (1e-08, "0", 0),
    (0, "0.0000001", 0),
    ("1e-05", "0.00001", 1),
    ("1E5", "100000", 1),
    (1e22, "10000000000000000000000", 1),
    (1e22, "10,000,000,000,000,000,000,000", 1),
    (1e22, "1e22", 1),
    (1e22, r"\boxed{10^{22}}", 1),
    (1e22, "10²²", 1),
    (1e22, "1", 0),
    (2.5e16, "25000000000000000", 1),
    (2.5e16, r"The answer is $2.5 \times 10^{16}$.", 1),
    (2.5e16, "2.5 x 10^16", 1),
    (2.5e16, "2.5", 0),
    (0.1 + 0.2, "0.3", 1),
    (0.1 + 0.2, "0.4", 0),
    (1 / 3, "1/3", 1),
    (1 / 3, r"\boxed{\frac{1}{3}}", 1),
    (1 / 3, "0.333333", 1),
    (1 / 3, "0.33", 0),
    ("1/3", "0.333333", 1),
    (3.14159, r"\pi", 0),
    (math.nan, "nan", NO),
    (math.inf, "inf", NO),
    (-math.inf, r"-\infty", NO),
    ("nan", "nan", NO),
    ("NaN", "0", NO),
    ("", "0", NO),
    ("  \n", "0", NO),
    (None, "None", NO),
    (True, "True", NO),
    (False, "0", NO),
    (b"72", "72", NO),
    (12345678901234567890, "12345678901234567890", 1),
    (12345678901234567890, "12345678901234567891", 0),
    ("12345678901234567890", "1.2345678901234567e19", 0),
    (10**5000, "1", NO),
    (10**300, "1e300", 1),
    (-5, "−5", 1),
    (-5, "-5", 1),
    (-5, "5", 0),
    (72, "７２", 1),
    (72, "٧٢", 1),
    (72, "७२", 1),
    (0.5, "½", 1),
    (1.5, "1½", 1),
    (1.5, "1 1/2", 1),
    ("1 1/2", "3/2", 1),
    ("1 1/2", "1", 0),
    (r"1\frac{1}{2}", "1.5", 1),
    ("1/2", "0.5", 1),
    ("1/2", "2/4", 1),
    ("1/2", r"\dfrac{1}{2}", 1),
    ("1/2", "1", 0),
    ("1/2", "2", 0),
    (1234567, "1,234,567", 1),
    (1234567, "1 234 567", 1),
    (1234567, r"\boxed{1{,}234{,}567}", 1),
    (1234567, r"\boxed{1\,234\,567}", 1),
    (1234567, "1'234'567", 1),
    (1234567, "1_234_567", 1),
    (2500000, "2.5 million", 1),
    ("2.5 million", "2,500,000", 1),
    ("2.5 million", "2.5", 0),
    ("50%", "50%", 1),
    ("50%", r"\boxed{50\%}", 1),
    ("50%", "0.5", 1),
    ("50%", "50", 1),
    ("50%", "50 percent", 1),
    ("50%", "5", 0),
    ("12.5%", "12.5", 1),
    (0.5, "50%", 1),
    (0.5, "0.5%", 0),
    (50, "50%", 1),
    ("$72", "72", 1),
    ("$72", "$72.00", 1),
    (r"\$18.90", "18.9", 1),
    ("€72", "72 €", 1),
    ("72 apples", "72", 1),
    ("72 apples", "72 apples", 1),
    ("72 apples", "71 apples", 0),
    ("5 cm", r"\boxed{5 \text{ cm}}", 1),
    ("5 km/h", "5", 1),
    (r"5 \text{ cm}^2", "5 square centimeters", 1),
    (r"90^\circ", "90", 1),
    ("90°", "90 degrees", 1),
    ("72.", "72", 1),
    ("**72**", "72", 1),
    ("`72`", "72", 1),
    ("$72$", "72", 1),
    (r"\(72\)", "72", 1),
    (r"\[72\]", "72", 1),
    ("<answer>72</answer>", "72", 1),
    ("The answer is 72.", "72", 1),
    ("The answer is **72**.", "71", 0),
    ("Answer: 72", "72", 1),
    ("so 48 + 24 = 72", "72", 1),
    ("It was May. There are 24 of them.\nSo in all 48 + 24 = $72$.", "72", 1),
    (r"First \boxed{71}, then \boxed{72}", "72", 1),
    ("one\n#### Answer: 72", "72", 1),
    ("3:4", "3:4", 1),
    ("3:4", "3 : 4", 1),
    ("3:4", "4:3", 0),
    ("3:4", "3", 0),
    ("10:30", "10:30", 1),
    ("10:30", "1:3", 0),
    ("10:30", "10", 0),
    ("10:30", "30:10", 0),
]

# Formulas, letters and words.
OTHERS: list[tuple[Any, str, float | None]] = [
    ("x=5", "x = 5", 1),
    ("x=5", "5", 1),
    ("x=5", "y=5", 0),
    ("x=5", "6", 0),
    ("2xy", "$2yx$", 1),
    ("2xy", "2", 0),
    ("x^2-2x+1", "$(x-1)^2$", 1),
    ("x^2-2x+1", "x²-2x+1", 1),
    ("x^2", "x2", 0),
    ("sqrt(2)/2", r"\boxed{\frac{\sqrt{2}}{2}}", 1),
    (r"\frac{\sqrt{2}}{2}", "√2/2", 1),
    (r"2\pi", "2π", 1),
    (r"2\pi", "2 pi", 1),
    (r"2\pi", "6.28", 0),
    (r"\infty", "∞", 1),
    ("2^10", "1024", 1),
    ("3!", "6", 1),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", 1),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix} 2 \\ 1 \end{pmatrix}}", 0),
    ("x > 5", "$x > 5$", 1),
    ("x > 5", "$x < 5$", 0),
    ("6 - 5i", r"\boxed{6-5i}", 1),
    (r"\emptyset", "∅", 1),
    ("C", "#### C", 1),
    ("#### C", "#### C", 1),
    ("C", "Hence $C$.", 1),
    ("C", r"Hence $\text{C}$.", 1),
    ("C", "→ C", 1),
    ("C", "Therefore, C.", 1),
    ("C", "Answer - C", 1),
    ("D", "None of the above (D)", 1),
    ("C", "None of the above (D)", 0),
    ("D", "Is it (A), (B), (C) or (D)", 0),
    ("D", "He needs vitamin D", 0),
    ("C", "The answer is (C).", 1),
    ("C", "The answer is C.", 1),
    ("C", "The answer is **C**.", 1),
    ("C", "**C**", 1),
    ("C", "C", 1),
    ("C", "(C)", 1),
    ("C", "C.", 1),
    ("C", "C. 42", 1),
    ("C", "C) 42", 1),
    ("C", "(C) 42", 1),
    ("C", "Answer: C", 1),
    ("C", "Answer: (C) 42", 1),
    ("C", "The correct option is C", 1),
    ("C", "The answer is option (C).", 1),
    ("C", "The correct answer is C, because A is too small.", 1),
    ("C", "A is too small, so I choose C", 1),
    ("C", "A is too small, so I choose (C)", 1),
    ("5", "So the answer is 5!", 1),
    ("120", "So the answer is 5!", 0),
    ("C", "A is too small, so I choose C or D", 0),
    ("C", "A is too small, so I choose (C) or (D)", 0),
    ("C", "A is too small, so I pick option [C] / [D]", 0),
    ("C, D", "A is too small, so I select options (C) and (D)", 1),
    ("C", "Answer: C] 42", 1),
    ("C", "Answer: C 42", 0),
    ("C", r"\boxed{C}", 1),
    ("C", r"\boxed{(C)}", 1),
    ("C", r"\boxed{C. 42}", 1),
    ("C", r"\boxed{\text{C}}", 1),
    ("C", r"\boxed{\textbf{(C) }42}", 1),
    ("C", r"\boxed{\textbf{(C)}\ 42}", 1),
    ("C", r"$\boxed{\textbf{(C)}~42}$", 1),
    ("C", r"\boxed{\mathrm{(C)}}", 1),
    ("C", "<think>A or B?</think><answer>C</answer>", 1),
    ("C", "答案：C", 1),
    ("C", r"\boxed{B} no, \boxed{C}", 1),
    ("C", r"\boxed{C} no, \boxed{B}", 0),
    ("C", "The answer is (B).", 0),
    ("C", "The answer is B, because C is too big.", 0),
    ("C", "The answer is A or C.", 0),
    ("C", "A, B, C, D", 0),
    ("D", "A) 1\nB) 2\nC) 3\nD) 4", 0),
    ("B", "B is correct.", 1),
    ("B", "I think (B) is the answer.", 1),
    ("B", "A and B are correct.", 0),
    ("C", "ABCD", 0),
    ("C", r"\boxed{A, C}", 0),
    ("C", r"\boxed{42}", 0),
    ("A", "A dog is not an answer", 0),
    ("A", "The answer is a number.", 0),
    ("C", "Cats", 0),
    ("C", "", 0),
    ("(C)", "C", 1),
    ("C.", "(C)", 1),
    (r"\text{(C)}", r"\boxed{C}", 1),
    (r"\textbf{(C)}", "The answer is C", 1),
    ("The answer is (C).", "C", 1),
    ("Answer: C", "B", 0),
    ("#### C", "C", 1),
    ("(C) 42", r"\boxed{C}", 1),
    ("(C) 42", r"\boxed{42}", 1),
    ("(C) 42", r"\boxed{(B) 42}", 0),
    ("(C) 42", r"\boxed{41}", 0),
    ("A, C", "C and A", 1),
    ("A, C", "A", 0),
    ("AC", "A, C", 1),
    (42, r"\boxed{\textbf{(C) }42}", 1),
    (42, r"\boxed{C. 42}", 1),
    (42, "The answer is (C) 42.", 1),
    (41, r"\boxed{\textbf{(C) }42}", 0),
    (r"\text{Evelyn}", "The answer is Evelyn.", 1),
    (r"\text{Evelyn}", r"\boxed{Evelyn}", 1),
    (r"\text{Evelyn}", r"\boxed{\text{evelyn}}", 1),
    (r"\text{Evelyn}", r"\boxed{\text{Bob}}", 0),
    (r"\text{Evelyn}", "It is not Evelyn but Bob.", 0),
    ("Paris", "Paris", NO),
    ("Paris", "London", NO),
    ("yes", "no", NO),
    ("no", "no", NO),
    ("True", "True", NO),
    ("none", "0", NO),
    ("None of the above", "A", NO),
    ("iPhone 12", "12", NO),
    ("Area 51", "Zone 51", NO),
    ("World War 2", "2", NO),
    ("2 hours 30 minutes", "2", NO),
    ("3 apples and 4 pears", "4", NO),
    ("seventy-two", "72", NO),
    ("A cat has 9 lives", "9", NO),
    ("I'd say\n\n#### nothing", "0", NO),
    ("2024-01-02", "2024-02-01", NO),
    ("2024-01-02", "2024-01-02", NO),
    ("2024-01-02", "2021", NO),
    ("01/02/2024", "02/01/2024", NO),
    ("1/2/2024", "0.5", NO),
    ("2.1.2024", "2.1", NO),
    ("2024-01-02T10:30:00", "2024", NO),
    (datetime.date(2024, 1, 2), "2024-02-01", NO),
    (datetime.datetime(2024, 1, 2, 3), "2024-01-02 03:00:00", NO),
    (datetime.timedelta(hours=1), "1:00:00", NO),
    ("January 2, 2024", "2024", NO),
    ("2 January 2024", "2", NO),
    ("10 AM", "10 PM", NO),
    ("10:30 AM", "10:30 PM", NO),
    ("12th", "12", NO),
    ("3-5", "-2", NO),
    ("3 - 5", "-2", NO),
    ("3–5", "-2", NO),
    ("3 to 5", "3", NO),
    ("555-1234", "-679", NO),
    ("(555) 123-4567", "555", NO),
    ("+1 555 123 4567", "1", NO),
    ("1.2.3", "1.2", NO),
    ("v1.10", "1.1", NO),
    ("192.168.0.1", "192.168", NO),
    ("0x1F", "0", NO),
    ("5 or more", "5", NO),
    ("12 34", "12", NO),
    ("?", "?", NO),
    ("-", "-", NO),
    (r"\boxed{}", "0", NO),
    ("9^{9^{9}}", "1", NO),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("table", [PLACES, LISTED, NUMBERS, OTHERS], ids=["places", "listed", "numbers", "others"])
def test_each_answer_gets_its_right_value(table: list[tuple[Any, str, float | None]]) -> None:
    got = [(gold, text, score(gold, text)) for gold, text, _ in table]
    assert [g for g, (_, _, value) in zip(got, table, strict=True) if g[2] != value] == []


def test_a_row_without_an_answer_has_its_solution_as_gold() -> None:
    assert accuracy(["4", "5", "6"], answer=["4", None, None], solution=["7", "5", None]) == [1, 1, None]


# ---- beside math-verify's defaults

TEMPLATES = [
    "{}", "${}$", "$${}$$", r"\({}\)", r"\[{}\]", r"\boxed{{{}}}", r"$\boxed{{{}}}$", r"\[\boxed{{{}}}\]", "**{}**",
    "The answer is {}.", "The answer is **{}**.", "The answer is ${}$.", "Answer: {}", "**Answer:** {}", "#### {}",
    "The final answer is {}. I hope it is correct.", "So x = {}.", "$x = {}$", "= {}", "48 + 24 = {}", "We get {}",
    "So the total is **{}** clips.", "It costs ${}.", "{} apples", "- {}", "answer = {}", "The answer should be {}",
    "The answer is {} because 3 + 4 is 7.", "1. First, 3 + 4 = 7.\n2. Then the result is {}.", "The result is\n$$\n{}\n$$",
    "**Final Answer**\n\n\\boxed{{{}}}", "so we have 12 and then {}", "Answer: {}\n\nExplanation: 3 + 4 = 7", "> {}",
    "Let me check. The answer is {}. Yes.", "The number is {}, which is even", "The area is {} cm^2", "| total | {} |",
]  # fmt: skip


@pytest.mark.timeout(300)
def test_a_right_number_that_math_verifys_defaults_find_is_found_here() -> None:
    from math_verify import parse, verify

    missed = []
    for number in ("72", "-5", "0", "1,234", "0.5", "1/2"):
        for template in TEMPLATES:
            text = template.format(number)
            if verify(parse(number), parse(text)) and score(number, text) != 1:
                missed.append(text)
    assert missed == []


# ---- time


@pytest.mark.timeout(300)
def test_a_gold_that_runs_out_of_time_fails_its_sample_and_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    score("x+1", "x+1")
    gold = r"\frac{x^2-4}{x-2}+13"

    def forever(*_args: Any) -> Any:
        return within_cpu_s(0.05, lambda: sum(1 for _ in iter(int, 1)))

    with monkeypatch.context() as patch:
        patch.setattr(readings, "parse_formula", forever)
        (part,) = call_reward(
            resolve(RewardFunctionConfig(name="accuracy")),
            ScoreInputs(["p"], [gold], [[1]], {"answer": [gold]}),
        )
        assert part.status is ScoreStatus.ERROR
        assert "took more than 3 s of CPU time" in part.detail
        assert "timeout_s" in part.detail
    assert score(gold, gold) == 1


@pytest.mark.parametrize("call", ["accuracy(['it is 0.5'], ['1/2'])", "math_votes(['it is 0.5'], ['1/2'])"])
def test_loading_math_verify_is_not_counted_to_the_first_answer(call: str) -> None:
    timed = call.replace("])", "], timeout_s=0.2)")
    imports = "from grpo_ray.rewards.accuracy import accuracy; from grpo_ray.rewards.votes import math_votes"
    code = f"{imports}; print({timed} == {call})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert ran.stdout == "True\n"


def test_the_clock_counts_work_and_not_waiting() -> None:
    assert within_cpu_s(0.2, lambda: time.sleep(0.5)) is None
    with cpu_below(10), pytest.raises(OutOfTimeError):
        within_cpu_s(0.1, lambda: sum(1 for _ in iter(int, 1)))


def test_a_library_that_swallows_the_clocks_signal_is_stopped_by_the_next() -> None:
    def swallow() -> None:
        try:
            for _ in iter(int, 1):
                pass
        except BaseException:
            for _ in iter(int, 1):
                pass

    with pytest.raises(OutOfTimeError):
        within_cpu_s(0.05, swallow)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("answer", ["9^{9^{9}}", "9^{9^{8}}", "99999999!", r"\binom{10^9}{10^8}", "10^{10^{10}} - 1"])
def test_an_answer_too_big_to_compute_is_wrong_at_once(answer: str) -> None:
    score("x+1", "x+1")
    with cpu_below(5):
        assert score(42, rf"\boxed{{{answer}}}") == 0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [("2^{2000}", "4^{1000}"), ("2^{2019}", r"2 \cdot 2^{2018}"), ("3^{1000}-1", "-1+3^{1000}"), (10**400, "10^{400}")],
)
def test_numbers_beyond_what_a_float_holds_are_compared_and_fail_nothing(gold: Any, answer: str) -> None:
    assert score(gold, rf"\boxed{{{answer}}}") == 1
    assert score(gold, rf"\boxed{{{answer}+1}}") == 0


RUNS = ["1 ", "1,", "$a", r"\boxed{", "**a", "`", "`a", "(", "answer is ", "A, ", "½", "x=1 or ", r"\text{", "__a"]


@pytest.mark.timeout(300)
def test_long_runs_of_anything_are_scored_within_a_second() -> None:
    score("x+1", "x+1")
    for gold in (72, "C"):
        for run in RUNS:
            with cpu_below(5, (gold, run)):
                score(gold, "The answer is " + (run * 32_000)[:32_000])


def test_units_of_endless_letters_do_not_backtrack() -> None:
    with cpu_below(10):
        assert score(6, r"\boxed{5 \text{" + "a" * 300 + "}}") == 0
        assert read_gold("5 " + "a" * 300, 3) == ()


IN_PARQUET: list[tuple[Any, Any, str, float | None]] = [
    *((kind, 72, "72", 1) for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16())),
    (pa.int64(), -(2**62), str(-(2**62)), 1),
    (pa.uint64(), 2**63 + 1, str(2**63 + 1), 1),
    (pa.float16(), 0.5, "1/2", 1),
    (pa.float32(), 0.1, "0.1", 1),
    (pa.float64(), 1e-05, "0.00001", 1),
    (pa.float64(), 1e22, "1" + 22 * "0", 1),
    (pa.float64(), 2.5e16, "25000000000000000", 1),
    (pa.float64(), math.nan, "nan", None),
    (pa.float64(), -math.inf, "-inf", None),
    (pa.decimal128(10, 2), Decimal("72.50"), "72.5", 1),
    (pa.string(), "1,234", "1234", 1),
    (pa.large_string(), "so #### 72", "72", 1),
    (pa.dictionary(pa.int8(), pa.string()), "72", "72", 1),
    (pa.list_(pa.string()), ["12", "34"], "34", 1),
    (pa.list_(pa.int64(), 2), [12, 34], "12, 34", 1),
    (pa.large_list(pa.float64()), [0.5], "0.5", 1),
    (pa.list_(pa.string()), [], "72", None),
    (pa.string(), "", "72", None),
    (pa.string(), "Paris", "Paris", None),
    (pa.null(), None, "None", None),
    (pa.bool_(), True, "1", None),
    (pa.binary(), b"72", "72", None),
    (pa.date32(), datetime.date(2024, 1, 2), "2024-01-02", None),
    (pa.timestamp("s"), datetime.datetime(2024, 1, 2), "2024", None),
    (pa.time32("s"), datetime.time(10, 30), "10:30", None),
    (pa.duration("s"), datetime.timedelta(seconds=72), "72", None),
    (pa.struct([("a", pa.int64())]), {"a": 72}, "72", None),
    (pa.map_(pa.string(), pa.int64()), [("a", 72)], "72", None),
]


@pytest.mark.parametrize(("kind", "value", "answer", "expected"), IN_PARQUET, ids=[str(c[0]) for c in IN_PARQUET])
def test_a_gold_of_any_type_of_parquet_is_read_right_or_not_at_all(
    tmp_path: Path, kind: Any, value: Any, answer: str, expected: float | None
) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["q"], "answer": pa.array([value], kind)}), path)
    (row,) = load_table(DataSource(path=str(path)), seed=1).rows
    golds = [row["answer"]] * 2
    assert accuracy([f"The answer is {answer}.", "The answer is 71.123."], golds) == [expected, expected and 0.0]


@pytest.mark.parametrize(
    ("written", "answer", "expected"),
    [
        ("72", "72", 1), ("72.0", "72", 1), ("1e-05", "0.00001", 1), ("1E22", "1" + 22 * "0", 1),
        ("123456789012345678901234567890", "123456789012345678901234567890", 1), ('"72"', "72", 1),
        ('["12", "34"]', "12", 1), ("[12, 34]", "34", 1), ("[]", "72", None), ("null", "None", None),
        ("true", "1", None), ('{"a": 72}', "72", None),
        ("[[1, 2], [3]]", "1", None), ('"\\u0000"', "72", None),
    ],
)  # fmt: skip
def test_a_gold_of_any_type_of_json_is_read_right_or_not_at_all(
    tmp_path: Path, written: str, answer: str, expected: float | None
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "q", "answer": {written}}}\n')
    (row,) = load_table(DataSource(path=str(path)), seed=1).rows
    golds = [row["answer"]] * 2
    assert accuracy([f"The answer is {answer}.", "The answer is 71.123."], golds) == [expected, expected and 0.0]


def test_a_box_is_cut_where_nothing_closes_the_last_one() -> None:
    texts = {r"\boxed{1} and \boxed{2": True, r"\boxed{1 and \boxed{2}": False, "2": False, r"so \boxed{": True}
    assert {text: ends_in_a_cut_box(text) for text in texts} == texts


def test_a_number_may_be_rounded_where_it_was_written_with_a_point_and_a_float_is_read_as_parquet_widened_it() -> None:
    assert [(r.number, r.has_point) for r in _numbers(5)] == [(5, False)]
    assert [(r.number, r.has_point) for r in _numbers(Fraction(1, 3))] == [(Fraction(1, 3), False)]
    assert [(r.number, r.has_point) for r in _numbers(Decimal("0.5"))] == [(Fraction(1, 2), True)]
    assert [(r.number, r.has_point) for r in _numbers(16777217.0)] == [(16777217, False)]
    assert [r.text for r in _numbers(0.123456789012)] == [_numbers(Decimal("0.123456789012"))[0].text]
    widened = float(np.float32(0.1))
    assert [r.number for r in _numbers(widened)] == [Fraction(repr(widened)), Fraction(1, 10)]
    assert [_numbers(x) for x in (math.nan, math.inf, Decimal("NaN"))] == [[], [], []]


def test_a_formula_that_a_solution_calls_its_answer_is_the_gold() -> None:
    solution = "We add both. The answer is $\\sqrt{2}$."
    assert accuracy([r"\boxed{\sqrt{2}}", r"\boxed{\sqrt{3}}"], solution=[solution] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("said", ["[C] carbon", "(C) carbon", "C) carbon", "C: carbon", "C because", "C"])
def test_a_letter_that_is_set_off_is_a_choice(said: str) -> None:
    assert leading_choice(said) == {"C"}


def test_a_letter_of_a_sentence_is_no_choice() -> None:
    assert leading_choice("C carbon") is None


def test_an_answer_of_a_mark_alone_has_no_words() -> None:
    assert said_words("The answer is .") == ["", ""]


def test_a_percentage_is_a_hundredth_for_math_verify() -> None:
    assert float(_symbol(Fraction(50), False, True).doit()) == 0.5
    assert float(_symbol(Fraction(25, 2), True, True).doit()) == 0.125
    assert float(_symbol(Fraction(25, 2), True, False)) == 12.5


def test_the_size_of_a_formula_is_never_estimated_below_its_value() -> None:
    nine, x = sympy.Integer(9), sympy.Symbol("x")
    for formula, value in (
        (sympy.Add(nine, nine, evaluate=False), 18),
        (sympy.Mul(nine, nine, nine, evaluate=False), 729),
        (sympy.Pow(nine, 3, evaluate=False), 729),
        (sympy.Float(2.5), 2.5),
        (sympy.Rational(7, 2), 3.5),
        (x, 10),
    ):
        assert 10 ** readings._log10(formula) >= value
    assert readings._log10(sympy.Pow(2, sympy.Integer(10) ** 8, evaluate=False)) == math.inf


@pytest.mark.parametrize(
    ("gold", "answer", "apart"),
    [
        (1e-8, 2e-8, True),
        (0, 1e-8, True),
        (0, 1e-10, False),
        (1e-8, 1.0005e-8, False),
        (1, 1.000001, False),
        (1, 2, False),
    ],
)
def test_tiny_numbers_are_equal_in_three_significant_digits(gold: float, answer: float, apart: bool) -> None:
    assert readings._far_apart(sympy.Float(gold) if gold else sympy.Integer(0), sympy.Float(answer)) is apart
    assert readings._far_apart(sympy.Symbol("x"), sympy.Float(answer)) is False

"""Examples of a supervised run, read and tokenized: demonstrations, pairs or labelled answers. Torch is not needed."""

from __future__ import annotations

import math
from typing import Any

from grpo_ray.config.supervised import DpoConfig, RewardModelConfig, SftConfig
from grpo_ray.data.preferences import PairSets, load_pairs
from grpo_ray.data.prompts import SftDataset, load_demonstrations
from grpo_ray.data.sources import Read, load_table
from grpo_ray.data.templates import make_template
from grpo_ray.data.turns import TurnEnd
from grpo_ray.errors import ConfigError


def load_examples(config: SftConfig, tokenizer: Any, read: Read = load_table) -> SftDataset | PairSets:
    """Read and tokenize the examples.

    Args:
        config: the options of the run.
        tokenizer: the tokenizer of its model.
        read: how rows are read.

    Raises:
        DataError: a row is unusable; the message names source, line or row, and the fix.
        ConfigError: the texts of a reward model end in its padding.
    """
    data, seed, longest = config.data, config.seed, config.max_length
    match config:
        case DpoConfig():
            return load_pairs(data, tokenizer, seed=seed, max_length=longest, read=read)
        case RewardModelConfig():
            check_padding(tokenizer, make_template(data.template, tokenizer).end)
            options = config.reward_model
            return load_pairs(
                data,
                tokenizer,
                seed=seed,
                max_length=longest,
                read=read,
                labelled=not options.pairwise,
                use_margin=options.use_margin,
                highest=1.0 if options.loss == "bce" else math.inf,
            )
    return load_demonstrations(data, tokenizer, seed=seed, max_length=longest, read=read)


def check_padding(tokenizer: Any, end: TurnEnd | None = None) -> None:
    """Check that texts do not end in padding, since Transformers reads a score at the last token that is no padding.

    Args:
        end: the end of the texts; None: the end-of-sequence token.

    Raises:
        ConfigError: that would not be the end of the text.
    """
    last = tokenizer.eos_token_id if end is None else end.id
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == last:
        raise ConfigError(
            "a reward model needs a padding token of its own, and the tokenizer has "
            + (
                "none"
                if tokenizer.pad_token_id is None
                else f"its end-of-sequence token {tokenizer.eos_token!r} for it"
                if last == tokenizer.eos_token_id
                else f"{tokenizer.pad_token!r} for it, which ends every answer"
            )
            + ": Transformers would read scores in the wrong place; set pad_token in the model's tokenizer_config.json to a token "
            "that texts don't hold"
        )

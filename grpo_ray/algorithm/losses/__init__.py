"""Losses. Every loss is a plain sum over tokens of (weight of the token x its loss).

The weight holds the *global* normalizer of the optimizer step (`aggregation.py`), so that the gradient is the same for
any split into micro-batches, any packing and any number of learners. A sequence is never split: a loss of the whole
sequence stands at each of its tokens. N: completion tokens of one packed micro-batch. S: its sequences.

    table.py         `algorithm.loss` -> one of grpo, grpo_sequence, dr_grpo, dapo, gspo, cispo, sapo, gmpo
    bounds.py        how far a log-ratio may go before it is exponentiated
    correction.py    rollout/training mismatch and staleness, as weights of the tokens' losses
    kl.py            the distance to the reference model
    value.py, sft.py a critic's loss; cross-entropy

Four log-probabilities, four names: `rollout_logps` are what the rollout engine reported, `old_logps` the learner's own values for
the version that sampled, `logps` those of the policy being trained, `ref_logps` those of the reference model.
"""

"""What is minimised. Every loss is a plain sum over tokens of (weight of the token x its loss).

The weight holds the *global* normalizer of the optimizer step (`aggregation.py`), so that the gradient is the same for
any split into micro-batches, any packing and any number of learners. N: completion tokens of one packed micro-batch.

Three log-probabilities, three names: `rollout` is what the sampler reported, `old` the learner's own value for the
version that sampled, `theta` the one being trained.
"""

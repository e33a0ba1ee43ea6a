"""Whether the routers of a model are such that their loss can be computed, and other experts than theirs be taken."""

from __future__ import annotations

import inspect
from copy import deepcopy

import torch
from torch import Tensor, nn

from grpo_ray.errors import ConfigError, kind_and_line
from grpo_ray.models.features.routing import Kept, Router, find_routers

_TRIED = 16
"""The number of tokens that a router is tried with."""
_WRONG = (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError)


def check_routers(hf: nn.Module, *, loss: bool, keeps: bool) -> None:
    """Try each kind of router of a model, which may be without memory, on random tokens and with random weights.

    Args:
        loss: whether learner.router_aux_loss_coef is set.
        keeps: whether rollout.keep_routing is set.

    Raises:
        ConfigError: the model has none, or one of a kind that is not known; says which.
    """
    asked = " and ".join(
        name for name, is_set in (("learner.router_aux_loss_coef", loss), ("rollout.keep_routing", keeps)) if is_set
    )
    if not asked:
        return
    routers = find_routers(hf)
    if not routers:
        raise ConfigError(
            f"{asked}: {type(hf).__name__} is no mixture of experts, or its routers are no modules that Transformers records; "
            "leave it out"
        )
    for router in {type(router.module): router for router in routers}.values():
        try:
            _try(router, hf.config.get_text_config().hidden_size, keeps=keeps)  # type: ignore[union-attr, operator]
        except _WRONG as e:
            raise ConfigError(
                f"{asked}: {type(hf).__name__} has routers that are not supported ({kind_and_line(e)}); leave it out"
            ) from None


@torch.no_grad()
def _try(router: Router, hidden_size: int, *, keeps: bool) -> None:
    module, generator = _random(router.module), torch.Generator().manual_seed(0)
    tokens = torch.randn(_TRIED, hidden_size, generator=generator)
    needed = list(inspect.signature(module.forward).parameters.values())[1:]
    # The biases of experts, which some routers are handed.
    others = [torch.zeros(router.num_experts) for p in needed if p.default is p.empty and "bias" in p.name]
    out = module(tokens, *others)
    scores, experts = router.roles(out)
    if not keeps:
        return
    num = out[experts].shape[-1]
    taken = torch.rand(_TRIED, router.num_experts, generator=generator).argsort(-1)[:, :num]
    with Kept(taken, router.num_experts) as kept:
        out = module(tokens, *others)
    name = type(module).__name__
    if kept.num_choices != 1 or not torch.equal(out[experts], taken):
        raise ValueError(f"{name} does not choose its experts as a top-k of all of them")
    if not (out[scores].isfinite() & (out[scores] != 0)).all():
        raise ValueError(f"{name} gives no weight to experts outside of the groups that it chooses")


def _random(module: nn.Module) -> nn.Module:
    """A copy with random weights, in this machine's memory."""
    made = deepcopy(module).to_empty(device="cpu").float().eval()
    generator, values = torch.Generator().manual_seed(1), [*made.parameters(), *made.buffers()]
    for value in filter(Tensor.is_floating_point, values):
        value.copy_(torch.randn(value.shape, generator=generator) / max(value.shape[-1], 1) ** 0.5)
    return made

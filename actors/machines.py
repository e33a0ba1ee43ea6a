"""What a run may be placed on: nodes with what they offer, of this machine or of a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from grpo_ray.labels import fits


@dataclass(frozen=True)
class Node:
    cpus: float
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def offers(self) -> dict[str, float]:
        """The resources, by Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus, **self.resources}


@dataclass(frozen=True)
class Machine:
    """What a run may be placed on: this machine, or a cluster."""

    nodes: tuple[Node, ...]
    cores: int | None = None
    """The cores of this machine, where Ray counts more CPUs (cluster.num_cpus). None: as many as CPUs."""
    free: Mapping[str, float] = field(default_factory=dict)
    """The resources that no other run holds, by Ray's names; a kind that is missing is free."""
    gpu_memory: int | None = None
    """The bytes of a GPU, of the smallest where they differ; None: not known."""

    @property
    def offers(self) -> dict[str, float]:
        out: dict[str, float] = {}
        for node in self.nodes:
            for name, amount in node.offers.items():
                out[name] = out.get(name, 0) + amount
        return out

    def gpus_of(self, resources: Mapping[str, float], labels: Mapping[str, str]) -> int:
        """The number of whole GPUs on nodes that may hold workers with these resources and labels."""
        nodes = [n for n in self.nodes if fits(n.labels, labels) and all(r in n.resources for r in resources)]
        found = sum(int(n.gpus) for n in nodes)
        return min(found, int(self.free.get("GPU", found)))

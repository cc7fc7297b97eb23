"""The trainer as every rank builds it, alone or among several."""

from __future__ import annotations

from collections.abc import Callable

from minidistill.config import Config
from minidistill.estimators import Estimator
from minidistill.trainer.distributed.fsdp import shard, shards
from minidistill.trainer.distributed.rank_group import World
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.policy import Policy
from minidistill.trainer.trainer import Trainer


def build_trainer(
    policy: Policy,
    config: Config,
    estimator: Estimator,
    warn: Callable[[str], None],
    world: World,
    prefixes: PrefixCache | None = None,
) -> Trainer:
    """The trainer of a policy that is loaded and, on the driver, checked; its weights are divided
    among the ranks if they are to be.

    The driver gives the `prefixes` of its engine.
    """
    shares = world.tell(prefixes is not None and prefixes.shares)
    policy.world = world
    if shards(config, world.size):
        shard(policy)
        prefixes = None  # the ranks' passes must be the same, whatever the driver has sampled
    return Trainer(policy, config, prefixes or PrefixCache(policy, shares), estimator, warn)

"""Building the trainer, in the same way on every rank."""

from __future__ import annotations

from minidistill.config import Config
from minidistill.placement.placement import Placement
from minidistill.trainer.distributed.fsdp import ShardedModels
from minidistill.trainer.distributed.rank_group import RankGroup
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.policy import Policy
from minidistill.trainer.trainer import Trainer


def build_trainer(
    policy: Policy,
    config: Config,
    placement: Placement,
    rank_group: RankGroup,
    prefixes: PrefixCache | None = None,
) -> Trainer:
    """A trainer for a loaded policy, whose weights are sharded if the placement says so.

    The driver calls it once it has checked the policy, and passes its engine's `prefixes`.
    """
    shares = rank_group.broadcast_object(prefixes is not None and prefixes.shares)
    contexts = prefixes.contexts if prefixes else ()  # the driver names the prefix of each step
    policy.rank_group = rank_group
    if placement.sharded:
        models = [policy.student, *policy.reference_models.values()]
        with rank_group.explained():
            policy.sharded = ShardedModels(
                models, policy.adapter_parameters, policy.device, rank_group.size
            )
        prefixes = None  # every rank must run the same passes, whatever the driver has sampled
    return Trainer(policy, config, placement, prefixes or PrefixCache(policy, shares, contexts))

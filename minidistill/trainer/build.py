"""The trainer as every rank builds it."""

from __future__ import annotations

from minidistill.config import Config
from minidistill.estimators import Estimator
from minidistill.placement.devices import shards_weights
from minidistill.trainer.distributed.fsdp import ShardedModels
from minidistill.trainer.distributed.rank_group import RankGroup
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.policy import Policy
from minidistill.trainer.trainer import Trainer


def build_trainer(
    policy: Policy,
    config: Config,
    estimator: Estimator,
    rank_group: RankGroup,
    prefixes: PrefixCache | None = None,
) -> Trainer:
    """The trainer of a loaded policy, which the driver has checked. Shards the weights if asked to.

    The driver passes the `prefixes` of its engine.
    """
    shares = rank_group.broadcast_object(prefixes is not None and prefixes.shares)
    policy.rank_group = rank_group
    if shards_weights(config, rank_group.size):
        models = [policy.student, *policy.reference_models.values()]
        policy.sharded = ShardedModels(
            models, policy.adapter_parameters, policy.device, rank_group.size
        )
        prefixes = None  # every rank must run the same passes, whatever the driver has sampled
    return Trainer(policy, config, estimator, prefixes or PrefixCache(policy, shares))

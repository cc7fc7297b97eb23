"""The configuration's `[orchestrator]`: rollouts, environments, teacher and evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import ConfigDict, Field

from minidistill.config.base import Count, Fraction, Positive, PositiveFloat, Table, Text, Weight
from minidistill.config.contexts import ContextConfig, ExamplesConfig

AGENT = "agent"  # the environment of the user's own program


class SamplingConfig(Table):
    """How completions are sampled in training."""

    temperature: PositiveFloat = 1.0
    """Temperature of the sampler, and of both distributions in the objective."""
    max_tokens: Positive = 512
    """Longest completion, in tokens; in a conversation, of each turn."""


class EvalSamplingConfig(Table):
    """How both models sample in evaluations."""

    temperature: Weight | None = None
    """By default the one of training; 0 is greedy."""
    max_tokens: Positive | None = None
    """By default the one of training."""


class BufferConfig(Table):
    """What is done with rollouts before training."""

    skip_verification: bool = False
    """Pure distillation: no rewards in training; `trainer.loss.adv_tau` must be 0."""


class TeacherConfig(Table):
    """The teacher: the model that reads the context in addition to the student's prompt."""

    model_config = ConfigDict(json_schema_extra={"not": {"required": ["context", "context_file"]}})

    context: str = ""
    """The context of environments that have none of their own. It, `context_file` or `contexts` is
    required if there are any."""
    context_file: Text | None = None
    """A text file with the context, relative to the TOML file that names it. When the configuration
    is loaded, `context` takes its text."""
    contexts: Annotated[list[ContextConfig], MinLen(1)] | None = None
    context_placement: Literal["user", "system"] = "user"
    """Before the first user message, or at the end of the system message."""
    eval_baseline: bool = False
    """Evaluate student and teacher before training; needs `[orchestrator.eval]`."""
    update: Literal["frozen", "live", "ema"] = "frozen"
    """The teacher's weights: the base model's, the student's, or a moving average of the latter.
    With `live` the student ended below the base in two of three settings, and neither average tried
    did better than `frozen` (docs/how-to-choose.md)."""
    ema_decay: Fraction = 0.99
    """Decay of the moving average with `update = "ema"`. 0.9 closed less of the gap."""


class EnvConfig(Table):
    """A task and its arguments."""

    id: Text
    """The name of a built-in or installed environment, or `module:function`."""
    name: Text = Field(default_factory=lambda data: data["id"])
    """Unique name in the metrics; by default the id."""
    weight: PositiveFloat | None = None
    """The share of training prompts from this environment, in proportion to the others' weights. By
    default each task is drawn once an epoch, so that the number of tasks decides."""
    context: str | None = None
    """The context of this environment's prompts; by default that of `teacher_model`. An empty one
    is none: the teacher reads what the student reads. A task's own context stands where `{context}`
    is in it, or else at its end."""
    context_file: Text | None = None
    """A text file with it, relative to the TOML file that names it."""
    contexts: Annotated[list[ContextConfig], MinLen(1)] | None = None
    examples: ExamplesConfig | None = None
    args: dict[str, Any] = Field(default={})
    """Arguments that the environment defines."""
    score_timeout: Literal["off"] | Annotated[float, Gt(0), Le(86_400)] = 10.0
    """Seconds that scoring one completion may take. Then it is stopped, and counts as a failure of
    the environment. Rewards that may hang or exit therefore run in a process of their own; `off`
    runs them in the process of the run, without a limit. Built-in rewards that cannot hang run
    there in any case, and `judge` has time limits of its own."""
    turn_timeout: Annotated[float, Gt(0), Le(86_400)] = 30.0
    """Seconds that a multi-turn environment may take between two answers of the policy. Then its
    conversation is stopped, and counts as a failure of the environment."""
    episode_timeout: Annotated[float, Gt(0), Le(86_400)] = 300.0
    """Seconds that a multi-turn environment may take in a conversation, all of its turns together.
    The time of sampling does not count."""

    @property
    def brings_context(self) -> bool:
        """Whether what the teacher alone reads is in the requests of the environment's program."""
        # a value that is neither is refused when the environment is loaded
        return self.id == AGENT and self.args.get("strip") != "context"


class EvalConfig(Table):
    """Evaluation on held-out problems; off unless the table is present."""

    interval: Count = 50
    """Steps between evaluations; 0 evaluates only before and after the run."""
    num_examples: Positive = 256
    """Problems from each environment."""
    rollouts_per_example: Positive = 1
    """Samples of each problem."""
    batch_size: Positive = 256
    """Rollouts sampled at a time."""
    env: Annotated[list[EnvConfig], MinLen(1)] | None = None
    """A list of tables, one for each environment to evaluate; by default those of training, with
    their evaluation split."""
    sampling: EvalSamplingConfig = EvalSamplingConfig()


class AdvantageConfig(Table):
    """The task advantage: the reward minus the mean reward of its group."""

    std_norm: bool = False
    """Divide it by the standard deviation of the group."""


_CONTEXT: list[Any] = [{"required": [key]} for key in ("context", "context_file", "contexts")]
_EXAMPLES: Any = {"required": ["examples"]}
_BRINGS: Any = {"required": ["id"], "properties": {"id": {"const": AGENT}}}


class OrchestratorConfig(Table):
    """Rollouts and where they come from."""

    model_config = ConfigDict(
        json_schema_extra={  # without a context of the teacher, each environment has its own
            "if": {"properties": {"teacher_model": {"not": {"anyOf": _CONTEXT}}}},
            "then": {"properties": {"env": {"items": {"anyOf": [*_CONTEXT, _EXAMPLES, _BRINGS]}}}},
        }
    )

    batch_size: Positive = 64
    """Rollouts per step; a multiple of `rollouts_per_example`. With equal samples, smaller steps
    closed more of the gap (docs/how-to-choose.md)."""
    rollouts_per_example: Positive = 4
    """Samples of each prompt: the group whose mean reward is the baseline."""
    max_env_error_frac: Annotated[float, Ge(0), Le(1)] = 0.1
    """The run stops if the environment fails for a larger share of a step's rollouts."""
    overlong: Literal["refuse", "drop"] = "refuse"
    """What happens to prompts that leave no room for a completion. Every prompt of a list is
    measured before step 1. `refuse` ends the run there, `drop` leaves them out and counts them.
    Prompts that are generated are measured when they are drawn: `drop` draws others then."""
    sample_from: Literal["student", "teacher"] = "student"
    """Whose completions are trained on. `teacher` is off-policy, a baseline to compare with: the
    teacher samples with the context, and the student is trained on these completions with its own
    prompt. The token masks are then off. docs/how-to-choose.md says when it is better."""
    sampling: SamplingConfig = SamplingConfig()
    buffer: BufferConfig = BufferConfig()
    teacher_model: TeacherConfig
    env: Annotated[list[EnvConfig], MinLen(1)]
    """A list of tables, one for each environment to train on; at least one."""
    eval: EvalConfig | None = None
    advantage: AdvantageConfig = AdvantageConfig()

    @property
    def weights(self) -> dict[str, float] | None:
        """Of the environments, if they have some."""
        weights = {env.name: env.weight for env in self.env if env.weight is not None}
        return weights or None

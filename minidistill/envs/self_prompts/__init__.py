"""`self-prompts`: the user's turns that the run's model writes itself, as an environment.

The run samples them and writes them to a file before the environment is needed
(`minidistill.driver.self_prompts`). What is here needs no model: the settings, the choice of usable
texts, and the environment over the file.
"""

from minidistill.envs.self_prompts.choice import Choice
from minidistill.envs.self_prompts.settings import CONTEXT, ID, Settings, load

__all__ = ["CONTEXT", "ID", "Choice", "Settings", "load"]

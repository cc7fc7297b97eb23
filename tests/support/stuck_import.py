"""A module whose import never ends. It makes the file that the variable STUCK names."""

import os
import time
from pathlib import Path

Path(os.environ["STUCK"]).touch()
time.sleep(600)

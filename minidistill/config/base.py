"""What every configuration table shares: strict, closed, frozen, documented by docstrings."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import BaseModel, ConfigDict, StringConstraints

Text = Annotated[str, MinLen(1)]
Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
Weight = Annotated[float, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
Fraction = Annotated[float, Gt(0), Lt(1)]
Decay = Annotated[float, Ge(0), Lt(1)]
# no user or password: URLs are shown and written down
Urls = Annotated[
    list[Annotated[str, StringConstraints(pattern=r"^https?://[^\s/@]+(/[^\s@]*)?$")]], MinLen(1)
]
GpuIds = Annotated[list[Count], MinLen(1)]


class Table(BaseModel):
    """A TOML table. Unknown keys, numbers as strings, infinities and NaNs are all refused."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        # `args` of an environment may hold any TOML value: keep the JSON valid whatever it is.
        ser_json_inf_nan="strings",
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

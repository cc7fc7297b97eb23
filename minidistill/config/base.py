"""What the tables of the configuration share: value types and validation."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints

from minidistill.system.http import check_address

Text = Annotated[str, MinLen(1)]
Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
Weight = Annotated[float, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
Fraction = Annotated[float, Gt(0), Lt(1)]
Decay = Annotated[float, Ge(0), Lt(1)]
# without user, password and query: URLs are printed and recorded
_Url = Annotated[
    str,
    StringConstraints(pattern=r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$"),
    AfterValidator(check_address),
]
Urls = Annotated[list[_Url], MinLen(1)]
GpuIds = Annotated[list[Count], MinLen(1)]


class Table(BaseModel):
    """A TOML table. Refuses unknown keys, numbers as strings, infinities and NaNs."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        # An environment's `args` may hold infinities and NaNs, for which JSON has no numbers.
        ser_json_inf_nan="strings",
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

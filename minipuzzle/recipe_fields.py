"""What sections of a recipe are made of: the base class, and texts that are checked."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from minipuzzle import deployments, units
from minipuzzle.errors import UserError


def _checked_tokens(text: str) -> str:
    return _valid(text, units.parse_tokens)


def _checked_bytes(text: str) -> str:
    return _valid(text, units.parse_bytes)


def _checked_budget(text: str) -> str:
    return _valid(text, units.parse_budget)


def _checked_parameters(text: str) -> str:
    return _valid(text, units.parse_parameters)


def _checked_latency(text: str) -> str:
    return _valid(text, units.parse_latency)


def _checked_preset(text: str) -> str:
    return _valid(text, deployments.find)


def _valid(text: str, parse: Any) -> str:
    """``text`` if ``parse`` takes it; ValueError (which pydantic collects) otherwise."""
    try:
        parse(text)
    except UserError as error:
        raise ValueError(str(error)) from None
    return text


def _text_of_number(value: Any) -> Any:
    """YAML reads 2048 as a number and 2k as text; both are text here."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


_Text = Annotated[str, BeforeValidator(_text_of_number)]
Tokens = Annotated[_Text, AfterValidator(_checked_tokens)]
Size = Annotated[_Text, AfterValidator(_checked_bytes)]
BudgetText = Annotated[_Text, AfterValidator(_checked_budget)]
ParametersText = Annotated[_Text, AfterValidator(_checked_parameters)]
LatencyText = Annotated[str, AfterValidator(_checked_latency)]
PresetName = Annotated[str, AfterValidator(_checked_preset)]


class Section(BaseModel):
    """A part of a recipe: frozen, strict about types, refuses unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )

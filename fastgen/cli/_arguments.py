"""Positional arguments that several commands have, with the names that help shows."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

Run = Positional[Annotated[Path, arg(metavar="RUN")]]
Pictures = Positional[Annotated[Path, arg(metavar="PICTURES")]]
PlanFile = Positional[Annotated[Path, arg(metavar="PLAN")]]

"""Ways in which a forward uses its arguments, added to PATTERNS."""

from fractions import Fraction

from tests.inference.patterns import PATTERNS, VALUE, Base, pattern

__all__ = ["PATTERNS"]


@pattern(
    "c2 b2; b1 act",
    {"c1": "goes to the function mul"},
    calls=[((VALUE,), {}), ((None,), {"return_features": True})],
)
class OptionalArguments(Base):
    def forward(self, x, scale=None, *, return_features=False):
        h = self.c1(x)
        if scale is not None:
            h = h * scale
        y = self.act(self.b1(h))
        y = self.b2(self.c2(y))
        return (y, h) if return_features else y


@pattern("c1 b1 act; c2 b2")
class ArgumentsOfAnyNumber(Base):
    def forward(self, x, *args, **kwargs):
        return self.b2(self.c2(self.act(self.b1(self.c1(x)))))


ANY_ARGUMENTS = [
    ((None,), {}), ((VALUE, 2), {}), ((), {"scale": VALUE}), ((), {"scale": None}), ((), {"a": 1})
]  # fmt: skip


@pattern("c1 b1 act; c2 b2", calls=ANY_ARGUMENTS)
class ArgumentsCounted(Base):  # diffusers' blocks
    def forward(self, x, *args, **kwargs):
        if len(args) > 0 or kwargs.get("scale") is not None:
            self.is_deprecated = True
        return self.b2(self.c2(self.act(self.b1(self.c1(x)))))


@pattern("c1 b1 act", {"c2": "goes to the function mul"}, calls=ANY_ARGUMENTS)
class ArgumentsUsed(Base):
    def forward(self, x, *args, **kwargs):
        h = self.c2(self.act(self.b1(self.c1(x))))
        try:
            return h * args[1]
        except IndexError:
            scale = kwargs.pop("scale", 2.0)
            return self.b2(h if scale is None else h * scale)


@pattern(
    "c2 b2; b1 act",
    {"c1": "goes to the function mul"},
    calls=[((None,), {}), ((None, None), {}), ((VALUE, None), {})],
)
class NoneWhereThereIsNoSuchDefault(Base):
    def _double_without(self, h, by):
        return h * 2 if by is None else h

    def forward(self, x, by=2.0, and_by=3.0):
        h = self._double_without(self._double_without(self.c1(x), by), and_by)
        return self.b2(self.c2(self.act(self.b1(h))))


@pattern("c1 b1 act; c2 b2", {}, calls=[((VALUE,), {}), ((), {"y": None})])
class LabelThatANormDoesNotTake(Base):  # mimicry's blocks, whose norms may be conditional
    def _without(self, x):
        return self.b2(self.c2(self.act(self.b1(self.c1(x)))))

    def _with(self, x, y):
        return self.b2(self.c2(self.act(self.b1(self.c1(x), y))), y=y)

    def forward(self, x, y=None):
        return self._without(x) if y is None else self._with(x, y)


@pattern("c1 b1 act; c2 b2", {}, calls=[((VALUE,), {})])
class RefusalBeforeOtherCalls(Base):
    def forward(self, x, y=None):
        if y is not None:
            return self.act(self.b1(self.c1(x), y)) + self.c2(x)
        return self.b2(self.c2(self.act(self.b1(self.c1(x)))))


@pattern("c2 b2; b1 act", {"c1": "goes to the function mul"}, calls=[((VALUE,), {})])
class RefusalThatIsCaught(Base):
    def forward(self, x, y=None):
        h = self.c1(x)
        try:
            h = self.b1(h, y) if y is not None else self.b1(h)
        except TypeError:
            h = self.b1(h * y)
        return self.b2(self.c2(self.act(h)))


@pattern("c2 b2", {"c1": "goes to the function add"}, calls=[(([],), {}), (("text",), {})])
class KindsOfArguments(Base):
    def forward(self, x, y=None):
        h = self.c1(x)
        if isinstance(y, (list, str)):
            h = h + len(y)
        return self.b2(self.c2(self.b1(h)))


@pattern("", {"": "converts a value to a Python number"}, calls=[((VALUE,), {}), (("text",), {})])
class NumbersOfArguments(Base):
    def forward(self, x, y=None):
        h = self.c1(x)
        try:
            return self.b1(h * float(y))
        except (TypeError, ValueError):
            return self.b1(h)


@pattern("", {"": "looks it up in a dictionary"}, calls=[(("double",), {})])
class SetsOfArguments(Base):
    def forward(self, x, mode="single"):
        h = self.c1(x)
        return self.b1(h * 2 if mode in {"double", "twice"} else h)


@pattern("", {"": "it checks the type, identity or attributes of mode"}, calls=[((True,), {}), ((None,), {})])
class ChecksAnArgument(Base):
    def forward(self, x, mode=False):
        h = self.c1(x)
        return self.b1(h * 2 if mode is True else h)


@pattern("", {"": "cannot be traced: TypeError"}, calls=[((VALUE,), {})])
class RaisesForATracedValue(Base):
    def forward(self, x, y=None):
        h = self.c1(x)
        return self.b1(h if y is None else h * float(Fraction(y)))

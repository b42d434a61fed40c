"""Modules that read a weight of a layer inside where no path from ``self`` leads to it, in as many ways."""

import functools
import operator

import torch.nn.functional as F
from torch import nn


def by_layer(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def by_module(module, x):
    return x @ module.inner.weight.T + module.inner.bias


def decorated(function):
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


def on_half(function):
    def call(self, x):
        return function(self, x * 0.5)

    return call


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return by_layer(self.inner, x)


class SelfByAnotherName(Reader):
    # the other name is the case
    def forward(_this, x):  # noqa: N805
        return F.linear(x, _this.inner.weight, _this.inner.bias)


class ByVariable(Reader):
    def forward(self, x):
        layer = self.inner
        return F.linear(x, layer.weight, layer.bias)


class ByLambda(Reader):
    # a forward that is a lambda is the case
    forward = lambda module, x: by_layer(module.inner, x)  # noqa: E731  # type: ignore[assignment]


class ByPartial(Reader):
    def __init__(self):
        super().__init__()
        self.read = functools.partial(by_layer, self.inner)

    def forward(self, x):
        return self.read(x)


class ByPartials(Reader):
    def __init__(self):
        super().__init__()
        self.readers = {"module": functools.partial(by_module, self)}

    def forward(self, x):
        return self.readers["module"](x)


class ByPartialMethod(Reader):
    read = functools.partialmethod(by_module)

    def forward(self, x):
        return self.read(x)


class ByFunctionInAttribute(Reader):
    def __init__(self):
        super().__init__()
        self.read = by_module

    def forward(self, x):
        return self.read(self, x)


class ByFunctionOfTheClass(Reader):
    read = by_module

    def forward(self, x):
        return self.read(x)


class ByFunctionInVariable(Reader):
    def forward(self, x):
        read = by_module
        return read(self, x)


class ByStaticMethod(Reader):
    @staticmethod
    def read(layer, x):
        return F.linear(x, layer.weight)

    def forward(self, x):
        return self.read(self.inner, x)


class ByProperty(Reader):
    @property
    def weight_of_inner(self):
        return self.inner.weight

    def forward(self, x):
        return F.linear(x, self.weight_of_inner)


class ByList(Reader):
    def __init__(self):
        super().__init__()
        self.layers = [self.inner]

    def forward(self, x):
        return by_layer(self.layers[0], x)


class ByLoop(Reader):
    def forward(self, x):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                x = by_layer(module, x)
        return x


class ByFunctionInside(Reader):
    def forward(self, x):
        def read():
            return F.linear(x, self.inner.weight)

        return read()


class ByGetattr(Reader):
    def forward(self, x):
        return F.linear(x, getattr(self.inner, "weight"))  # noqa: B009


class ByBaseClass(Reader):
    def forward(self, x):
        return super().forward(x)


class ByNamedBaseClass(Reader):
    def forward(self, x):
        return Reader.forward(self, x)


class ByDecorated(Reader):
    @on_half
    def forward(self, x):
        return by_layer(self.inner, x)


class Calls(Reader):
    def forward(self, x):
        return self.inner(x)


class OfTheOneInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Calls()

    def forward(self, x):
        return by_module(self.block, x)


class UndecidedArguments(Reader):
    @decorated
    def forward(self, x):
        return by_layer(self.inner, x)


class ByOwnCall(Calls):
    def __call__(self, x):
        return by_layer(self.inner, x)


INNER_WEIGHT, INNER_BIAS = operator.attrgetter("inner.weight"), operator.attrgetter("inner.bias")


class ByGetter(Reader):
    def forward(self, x):
        return F.linear(x, INNER_WEIGHT(self), INNER_BIAS(self))


class ByTheGetterOfTheClass(Reader):
    read = operator.attrgetter("inner.weight")

    def forward(self, x):
        return F.linear(x, ByTheGetterOfTheClass.read(self), self.inner.bias)


class ByGetParameter(Reader):
    def forward(self, x):
        return F.linear(x, self.get_parameter("inner.weight"), self.get_parameter("inner.bias"))


ADAPTED = [
    Reader, SelfByAnotherName, ByVariable, ByLambda, ByPartial, ByPartials, ByPartialMethod, ByFunctionInAttribute,
    ByFunctionOfTheClass, ByFunctionInVariable, ByStaticMethod, ByProperty, ByList, ByLoop, ByFunctionInside, ByGetattr,
    ByBaseClass, ByNamedBaseClass, ByDecorated, Calls, OfTheOneInside,
    ByGetter, ByTheGetterOfTheClass, ByGetParameter, UndecidedArguments, ByOwnCall,
]  # fmt: skip

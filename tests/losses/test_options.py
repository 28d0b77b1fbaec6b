"""An option is a field: checks, schema and the ranks' comparison follow from it."""

import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import torch

from repmtl_kernels import (
    CSALoss,
    RepMTL,
    RepMTLLoss,
    TSRLoss,
    _distributed,
    csa_loss,
    reference,
    rep_mtl_loss,
    tsr_loss,
)
from repmtl_kernels._losses import config, forward
from repmtl_kernels._losses.config import Config
from repmtl_kernels._losses.options import CsaOptions, Lambdas, TsrOptions, facts
from repmtl_kernels.modules import LossModule

KINDS = [TsrOptions, CsaOptions, Lambdas]
# Functions and modules by the options that they take; a module's prefixes are those of both losses.
TAKES = {
    tsr_loss: [TsrOptions],
    reference.tsr_loss: [TsrOptions],
    TSRLoss: [TsrOptions],
    csa_loss: [CsaOptions],
    reference.csa_loss: [CsaOptions],
    CSALoss: [CsaOptions],
    rep_mtl_loss: KINDS,
    RepMTLLoss: KINDS,
    RepMTL: KINDS,
}
OTHER_VALUES = {"normalizer": "softmax", "over": "space", "memory": "recompute"}
FIELDS = [(kind, field) for kind in KINDS for field in dataclasses.fields(kind)]
FIELD_IDS = [f"{kind.__name__}.{field.name}" for kind, field in FIELDS]
SALIENCIES = [torch.randn(2, 3, 4) for _ in range(2)]
BOTH = Config("eager", False, 1, True, TsrOptions(), CsaOptions(), "world", Lambdas())


def keyword(kind: type, field: dataclasses.Field) -> str:
    """The keyword of a field where two losses share a call."""
    return (kind.prefix if field.metadata["prefixed"] else "") + field.name


def check(kind: type, field: dataclasses.Field, value: object, prefix: bool) -> None:
    options = dataclasses.replace(kind(), **{field.name: value})
    options.check(*([kind.prefix] if prefix and kind is not Lambdas else []))


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=FIELD_IDS)
def test_every_option_is_checked(kind: type, field: dataclasses.Field):
    for value in (object(), None, "x"):
        with pytest.raises((ValueError, TypeError), match=f"^{keyword(kind, field)}: expected"):
            check(kind, field, value, prefix=True)
    if kind is not Lambdas:
        with pytest.raises((ValueError, TypeError), match=f"^{field.name}: expected"):
            check(kind, field, "x", prefix=False)


@pytest.mark.parametrize("kind", KINDS)
def test_checked_options_are_the_same_as_floats(kind: type):
    numbers = {f.name: 2 for f in dataclasses.fields(kind) if f.type == "float"}
    checked = kind(**numbers).check()
    assert checked == kind(**numbers)
    assert all(type(getattr(checked, name)) is float for name in numbers)
    assert kind().check() == kind()


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=FIELD_IDS)
def test_every_option_is_a_keyword_with_its_default(kind: type, field: dataclasses.Field):
    callers = [called for called, kinds in TAKES.items() if kind in kinds]
    for called in callers:
        name = keyword(kind, field) if TAKES[called] is KINDS else field.name
        parameter = inspect.signature(called).parameters[name]
        own = called is RepMTL and kind is Lambdas  # None: the default, or a strength's mix
        assert parameter.default == (None if own else field.default), called


@pytest.mark.parametrize("called", [c for c in TAKES if inspect.isclass(c)])
def test_options_of_a_module_are_its_attributes(called: type):
    parameters = list(inspect.signature(called).parameters)
    module = called()
    assert list(module.options()) == parameters
    assert set(inspect.get_annotations(called) | LossModule.__annotations__) == set(parameters)
    for name in parameters:
        setattr(module, name, marker := object())
        assert module.options()[name] is marker


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=FIELD_IDS)
def test_every_option_reaches_the_operators(kind: type, field: dataclasses.Field):
    arguments = [argument.split() for argument in config.SCHEMA.split(", ")]
    assert [field.type, kind.prefix + field.name] in arguments
    entry = {TsrOptions: "tsr", CsaOptions: "csa", Lambdas: "lambdas"}[kind]
    changed = OTHER_VALUES.get(field.name, 0.75)
    other = BOTH._replace(**{entry: dataclasses.replace(kind(), **{field.name: changed})})
    flat = other.flat()
    assert len(flat) == len(arguments)
    assert [a[1] for a, x, y in zip(arguments, BOTH.flat(), flat, strict=True) if x != y] == [
        kind.prefix + field.name
    ]
    assert Config.from_flat(flat) == other


def test_losses_that_are_left_out_keep_their_place_in_the_schema():
    for changes in ({"tsr": None}, {"csa": None}, {"lambdas": None}, {"tsr": None, "csa": None}):
        left = BOTH._replace(**changes)
        assert len(left.flat()) == len(BOTH.flat())
        assert Config.from_flat(left.flat()) == left
    names = [argument.split()[1] for argument in config.SCHEMA.split(", ")]
    schema = torch.ops.repmtl.losses.default._schema
    assert [argument.name for argument in schema.arguments[3:]] == names


def row(evaluation: Config) -> list[float]:
    facts_of_losses = forward._facts(evaluation, evaluation.csa, SALIENCIES, None)
    return [fact.number() for fact in facts_of_losses]


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=FIELD_IDS)
def test_every_option_reaches_the_operators_of_all_stages(kind: type, field: dataclasses.Field):
    if kind is Lambdas or field.name == "memory":
        pytest.skip("these operators save the Gram matrices, and the caller weighs the losses")
    entry = {TsrOptions: "tsr", CsaOptions: "csa"}[kind]
    other = kind(**{field.name: OTHER_VALUES.get(field.name, 0.75)})
    sent = []
    operators = SimpleNamespace(losses=lambda *arguments: sent.append(arguments[3:]))
    for options in (kind(), other):
        evaluation = BOTH._replace(**{"tsr": None, "csa": None} | {entry: options})
        forward._run_fused(operators, evaluation, SALIENCIES, None, None)
    assert sent[0] != sent[1]


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=FIELD_IDS)
def test_every_option_is_compared_between_ranks(kind: type, field: dataclasses.Field):
    entry = {TsrOptions: "tsr", CsaOptions: "csa", Lambdas: "lambdas"}[kind]
    changes = {field.name: OTHER_VALUES.get(field.name, 0.75)}
    # eps is one keyword of both losses.
    kinds = {"tsr": TsrOptions, "csa": CsaOptions} if field.name == "eps" else {entry: kind}
    other = BOTH._replace(**{n: dataclasses.replace(k(), **changes) for n, k in kinds.items()})
    differ = [x != y for x, y in zip(row(BOTH), row(other), strict=True)]
    assert sum(differ) == field.metadata["compared"]
    named = facts(*(k() for k in KINDS))
    assert (keyword(kind, field) in named) == field.metadata["compared"]


def test_rows_of_all_losses_have_one_form_and_fit():
    for left in (BOTH, BOTH._replace(tsr=None), BOTH._replace(tsr=None, lambdas=None)):
        sent = forward._facts(left, left.csa, SALIENCIES, None)
        assert len(sent) == len(row(BOTH))
        assert 2 + len(sent) <= _distributed.WIDTH  # after the kind and the batch


def test_facts_of_the_criterion_fit():
    facts_of_criterion = RepMTL()._checked_options().facts(calls=0)
    assert 1 + len(facts_of_criterion) <= _distributed.WIDTH  # after the kind


def test_facts_are_numbers_and_their_texts():
    for value, text in ((None, "None"), (3, "3"), (0.25, "0.25"), (True, "1"), (0, "0")):
        fact = _distributed.Fact(value, "")
        assert fact.text(fact.number()) == text
    for kind in KINDS:
        for name, fact in facts(kind(), prefixed=False).items():
            number = fact.number()
            assert isinstance(number, float) and fact.expected == f"the same {name}"
            assert fact.text(number) == str(fact.value) or not fact.choices

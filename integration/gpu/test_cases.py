"""Which cases come first, and what is drawn for them."""

import pytest
import torch

from qplug_converters.scheme import Kind
from qplug_kernels import Problem
from qplug_kernels.grids import check

from . import cases
from .cases import ALL, FORMS, LLAMA_3_8B, TINY, draw, plan


def test_every_case_is_planned_once_the_important_ones_first():
    groups = plan(FORMS, LLAMA_3_8B)
    planned = [(g.form.name, g.linear.name, m) for g in groups for m in g.tokens]
    assert len(planned) == len(set(planned))
    assert len(planned) == 4 * sum(len(form.tokens) for form in FORMS)
    assert [g.turn for g in groups] == sorted(g.turn for g in groups)
    first = [g for g in groups if g.turn == 0]
    assert {g.form.name for g in first} == {"int4", "int4-asym"}
    assert {g.tokens for g in first} == {(1, 16)}
    assert {m for g in groups if g.turn == 3 for m in g.tokens} == {128, 256, 1024, 4096}


def test_most_bounds_the_tokens():
    assert max(m for g in plan(FORMS, TINY, 16) for m in g.tokens) == 16


def test_four_bits_have_all_numbers_of_tokens_and_others_three():
    by_name = {form.name: form for form in FORMS}
    for name in ("int4", "int4-asym", "int4-act-order", "nf4"):
        assert by_name[name].tokens == ALL
    for name in ("int3", "int2", "int8"):
        assert by_name[name].tokens == (1, 16, 64)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("linear", TINY, ids=lambda linear: linear.name)
def test_what_is_drawn_is_what_the_form_says(form, linear):
    weight = draw(form, linear, "cpu")
    check(weight)
    problem = Problem.here(weight, form.dtype)
    assert (problem.bits, problem.kind) == (form.bits, form.kind)
    assert problem.act_order == form.act_order or linear.in_features == form.group_size
    assert torch.equal(weight.codes, draw(form, linear, "cpu").codes)
    assert weight.codes.unique().numel() == 1 << form.bits
    if form.kind is Kind.AFFINE:
        middle = weight.affine.zeros == 1 << (form.bits - 1)
        assert bool(middle.all()) == form.symmetric
        assert weight.affine.scales.dtype == form.dtype


def test_unknown_forms_are_an_error():
    with pytest.raises(KeyError, match="int5"):
        cases.named(["int5"])


def test_activations_are_the_same_each_time():
    x = cases.activations(FORMS[0], TINY[0], 3, "cpu")
    assert x.shape == (3, 256)
    assert torch.equal(x, cases.activations(FORMS[0], TINY[0], 3, "cpu"))

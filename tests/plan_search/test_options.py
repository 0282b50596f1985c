"""Keywords of `search`: all are told, and one that is none is refused."""

import inspect
import re

import pytest

import mpsearch as mps
from mpsearch.plan_search.options import SearchOptions, with_defaults
from mpsearch.plan_search.schedule import Schedule

#: Keywords that scripts have used since the first release.
KEYWORDS = {
    "select", "report", "effort", "max_passes", "metric", "loss", "higher_is_better", "tolerance", "minimize", "front", "estimators",
    "layers", "exclude", "groups", "allow", "fixed", "quantizer", "resources", "checkpoint", "previous", "seed", "progress",
}  # fmt: skip


def test_every_keyword_of_before_is_still_there_and_the_named_ones_are_few():
    named = [x.name for x in inspect.signature(mps.search).parameters.values() if x.kind is not x.VAR_KEYWORD]
    assert named[:4] == ["model", "batches", "budget", "precisions"]
    assert len(named) <= 10
    assert {*named, *SearchOptions.__annotations__} >= KEYWORDS
    assert not {*named} & {*SearchOptions.__annotations__}


def test_every_option_has_a_default_and_its_line():
    assert with_defaults({}, ()).keys() == SearchOptions.__annotations__.keys()
    told = re.findall(r"^    (\w+): ", inspect.getdoc(SearchOptions) or "", re.MULTILINE)
    assert told == list(SearchOptions.__annotations__)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tolerence", "did you mean 'tolerance'?"),
        ("max_pases", "did you mean 'max_passes'?"),
        ("frnt", "did you mean 'front'?"),
    ],
)
def test_an_unknown_keyword_is_refused_with_the_nearest(name, words):
    with pytest.raises(TypeError, match=re.escape(f"search() has no argument {name!r}; {words}")):
        mps.search(None, [], mps.Budget(average_bits=4), mps.precisions("w4"), **{name: 1})


@pytest.mark.parametrize(
    ("proposers", "words"),
    [
        (["thomson"], "unknown proposer 'thomson'; did you mean 'thompson'?"),
        ([3], "3 is no proposer: expected a name or an object with the method 'propose'"),
        ([Schedule], "is no proposer"),
        ([], "expected a list of names or objects"),
        ("thompson", "expected a list of names or objects"),
    ],
)
def test_what_is_no_proposer_is_refused_before_any_work(proposers, words):
    with pytest.raises(mps.EstimatorError, match=re.escape(words)):
        mps.search(None, [], mps.Budget(average_bits=4), mps.precisions("w4"), proposers=proposers)

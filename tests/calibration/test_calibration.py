"""The prepared model: made ready once, put back once, whatever is asked of it inside."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mpsearch as mps
from mpsearch.models import running
from mpsearch.quantizers import fake_quantization
from mpsearch.sensitivity import FisherProjection, KLDivergence, OutputMSE, RelativeWeightError

OPTIONS = mps.precisions("w2 w4a4 w8a8")


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    model[4].weight.data.mul_(10)  # no output may be taken for a probability
    return model


def batches(number: int = 3, seed: int = 1) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(number)
    ]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a model is hashed, taken apart, its ranges calibrated, and its determinism tried."""
    counter: Counter[str] = Counter()

    def counted(module: Any, name: str, number: Any = lambda *_: 1) -> None:
        original = getattr(module, name)

        def wrapper(*args: Any, **keywords: Any) -> Any:
            counter[name] += number(*args)
            return original(*args, **keywords)

        for place in PLACES:
            if getattr(place, name, None) is original:
                monkeypatch.setattr(place, name, wrapper)

    import mpsearch.calibration.calibration as room
    import mpsearch.models.determinism as determinism
    import mpsearch.plan_search.searching as searching

    PLACES = (room, determinism, searching, running, fake_quantization)
    counted(running, "state_fingerprint")
    counted(running, "decomposed")
    counted(fake_quantization, "input_ranges")
    counted(determinism, "probed_output")
    return counter


def test_a_profile_prepares_once(counts: Counter[str]) -> None:
    mps.profile(net(), batches(), [FisherProjection(), KLDivergence(), RelativeWeightError()], OPTIONS)
    assert counts == {"state_fingerprint": 2, "decomposed": 1, "input_ranges": 1, "probed_output": 1}


def test_several_calls_prepare_once(counts: Counter[str]) -> None:
    with mps.Calibration(net(), batches(), OPTIONS) as calibration:
        table = calibration.profile(KLDivergence())
        calibration.profile([OutputMSE(), FisherProjection()])
        plan = mps.solve(table, mps.Budget(average_bits=4)).plan
        assert plan is not None
        calibration.measure([plan, plan], batches(2, seed=5))
        calibration.evaluate(plan)
    assert counts == {"state_fingerprint": 2, "decomposed": 1, "input_ranges": 1, "probed_output": 1}


def test_calls_inside_give_what_the_doors_give() -> None:
    held_out = batches(2, seed=5)
    with mps.Calibration(net(), batches(), OPTIONS) as calibration:
        tables = calibration.profile([KLDivergence(), FisherProjection()])
        plan = mps.Plan({layer.name: option for layer, option in zip(calibration.layers, OPTIONS, strict=True)})
        measured, evaluation = calibration.measure([plan], held_out), calibration.evaluate(plan, held_out)
        forecast = calibration.forecast(KLDivergence())
    for table, door in zip(
        tables, mps.profile(net(), batches(), [KLDivergence(), FisherProjection()], OPTIONS), strict=True
    ):
        np.testing.assert_array_equal(table.sensitivity, door.sensitivity)
        assert table.usage.keys() == door.usage.keys()
    told = mps.forecast(net(), batches(), KLDivergence(), OPTIONS)
    assert (forecast.forward, forecast.memory) == (told.forward, told.memory)
    assert measured.damage[0] == mps.measure_plans(net(), held_out, [plan], calibration=batches()).damage[0]
    assert evaluation == mps.evaluate(net(), held_out, plan, calibration=batches())
    assert evaluation.kl == pytest.approx(measured.damage[0], rel=1e-12)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_model_is_put_back_whatever_happens(error: type[BaseException]) -> None:
    model = net().train()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(error), mps.Calibration(model, batches(), OPTIONS) as calibration:  # noqa: PT012
        assert not model.training
        calibration.profile(RelativeWeightError())
        raise error
    assert model.training
    assert "_mpsearch_apart" not in vars(model)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_who_changed_the_model_is_named() -> None:
    model = net()

    def vandal(model: nn.Module, batch: Any) -> float:
        next(model.parameters()).data.add_(1.0)
        return 0.0

    with pytest.raises(mps.EstimatorError, match="the metric or the loss changed the model's parameters"):  # noqa: SIM117
        with mps.Calibration(model, batches(), metric=vandal) as calibration:
            calibration.measure([mps.Plan({"0": mps.Precision("4")})])


def test_outside_it_says_how_it_is_used() -> None:
    calibration = mps.Calibration(net(), batches(), OPTIONS)
    for use in (
        lambda: calibration.profile(KLDivergence()),
        lambda: calibration.measure([mps.Plan({"0": mps.Precision("4")})]),
        lambda: calibration.evaluate(mps.Plan({"0": mps.Precision("4")})),
    ):
        with pytest.raises(mps.EstimatorError, match=r"write `with mps\.Calibration"):
            use()


def test_without_precisions_plans_are_measured_and_no_table_is_made() -> None:
    with mps.Calibration(net(), batches()) as calibration:
        assert calibration.measure([mps.Plan({"0": mps.Precision("2")})]).damage[0] > 0
        with pytest.raises(mps.EstimatorError, match="no precisions given"):
            calibration.profile(KLDivergence())


def test_an_unknown_keyword_is_told_with_the_nearest_name() -> None:
    with pytest.raises(TypeError, match="'excluded'; did you mean 'exclude'"):
        mps.profile(net(), batches(), KLDivergence(), OPTIONS, excluded=["0"])  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="'higher_is_beter'; did you mean 'higher_is_better'"):
        mps.Calibration(net(), batches(), OPTIONS, higher_is_beter=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'group'; did you mean 'groups'"):
        mps.forecast(net(), batches(), KLDivergence(), OPTIONS, group="none")  # type: ignore[call-arg]


def test_layer_options_say_what_single_keywords_say() -> None:
    options = mps.LayerOptions(exclude=["4"], allow={"0": "w8a8"})
    table = mps.profile(net(), batches(), RelativeWeightError(), OPTIONS, layers=options)
    other = mps.profile(net(), batches(), RelativeWeightError(), OPTIONS, exclude=["4"], allow={"0": "w8a8"})
    assert [layer.name for layer in table.layers] == [layer.name for layer in other.layers] == ["0", "2"]
    np.testing.assert_array_equal(table.sensitivity, other.sensitivity)


def test_a_checkpoint_serves_several_calls(tmp_path: Any) -> None:
    path = tmp_path / "run.db"
    with mps.Calibration(net(), batches(), OPTIONS, checkpoint=path) as calibration:
        first = calibration.profile(KLDivergence())
        again = calibration.profile(KLDivergence())
    assert first.origin["passes_in_this_run"]["forward"] > again.origin["passes_in_this_run"]["forward"]
    with mps.Calibration(net(), batches(), OPTIONS, checkpoint=path) as calibration:
        np.testing.assert_array_equal(calibration.profile(KLDivergence()).sensitivity, first.sensitivity)


def test_warnings_point_at_the_line_of_the_user() -> None:
    model, data = net(), [x for x, _ in batches()]
    with pytest.warns(mps.MpsearchWarning) as told:  # noqa: PT031
        mps.profile(model, data, KLDivergence(), OPTIONS)
        mps.evaluate(model, data, mps.Plan({"0": mps.Precision("4")}))
        with mps.Calibration(model, data, OPTIONS) as calibration:
            calibration.profile(KLDivergence())
    assert {warning.filename for warning in told} == {__file__}
    assert len(told) > 3


def loads(values: Iterable[Tensor]) -> Iterator[Tensor]:
    yield from values


def test_data_is_read_once() -> None:
    x = [x for x, _ in batches()]
    with pytest.warns(mps.MpsearchWarning), mps.Calibration(net(), loads(x), OPTIONS) as calibration:  # noqa: PT031
        calibration.profile([KLDivergence(), FisherProjection()])
        assert len(calibration.whole) == len(calibration.batches) == 3

"""Slices are the text, only in parts; what is said of convergence holds on data that we made."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from models import EXPERTS, tiny_model, token_batches
from tiny_run import save_model, settings

from moe_jax.calibrate import Measurement, calibrate_domains
from moe_jax.calibrate.shares import share_out
from moe_jax.confidence import (
    FLOOR,
    Ranking,
    Slices,
    convergence,
    converges,
    coverage,
    describe_confidence,
    score_intervals,
    verdict,
)
from moe_jax.scoring import EXPERT_CRITERIA, score
from moe_jax.statistics import Stats
from moe_jax.statistics_table import sliced

# Sums of a few hundred float32 numbers, in another order.
ROUNDING = {"rtol": 5e-5, "atol": 1e-5}
# A model that is its own teacher has no gradient of all of its predictions.
METHODS = sorted(filter(converges, set(EXPERT_CRITERIA) - {"taylor_kd_full"}))


@pytest.fixture(scope="module")
def domains():
    batches = token_batches(9, batch=2)
    return {"prose": batches[:4], "code": batches[4:8], "notes": batches[8:]}


@pytest.fixture(scope="module")
def measured(domains):
    params, config = tiny_model()
    return calibrate_domains(params, config, domains, Measurement(("kd_topk", "lm")))


def merged(parts) -> Stats:
    first, *rest = parts
    for part in rest:
        first = first.merge(part)
    return first


def test_slices_merge_to_the_whole(measured):
    # 3 batches per domain on average: 2 shares. The domain of one batch is no stratum of its own.
    assert sorted(measured.slices) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    whole = merged(measured.slices.values())
    assert (whole.tokens, whole.sequences, whole.batches) == (
        measured.tokens,
        measured.sequences,
        measured.batches,
    )
    for i, layer in measured.layers.items():
        kept = sliced(layer)
        assert kept.keys() == whole.layers[i].keys()
        assert {"count", "output_m2", "output_gram", "lm.expert_batch_abs"} <= set(kept)
        # Nothing with an axis of neurons, of which real models have many.
        assert not [name for name in kept if "neuron" in name or name.endswith("weight_norm")]
        for name, array in kept.items():
            np.testing.assert_allclose(whole.layers[i][name], array, err_msg=name, **ROUNDING)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.sampled_from([1, 2, 3, 5, 8, 12]))
def test_batches_are_dealt_out_evenly(numbers, most):
    held: dict[tuple[int, int], int] = {}
    for number, place in zip(numbers, share_out(numbers, most), strict=True):
        for n in range(number):
            key = (place.stratum, (place.first + n) % place.shares)
            held[key] = held.get(key, 0) + 1
    assert sum(held.values()) == sum(numbers)
    assert len(held) <= most
    assert sum(numbers) == 1 or most == 1 or len(held) > 1
    by_stratum: dict[int, list[int]] = {}
    for (stratum, _), size in held.items():
        by_stratum.setdefault(stratum, []).append(size)
    for sizes in by_stratum.values():
        assert max(sizes) - min(sizes) <= 1
    # Without that, the text of a stratum would seem to be no matter of chance.
    assert len({len(sizes) for sizes in by_stratum.values()}) == 1


def test_shares_of_a_stratum_have_the_same_domains():
    """Eight domains of two batches: no share lacks a domain that its neighbour has."""
    places = share_out([2] * 8, 8)
    assert {place.shares for place in places} == {2}
    assert sorted(place.stratum for place in places) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert share_out([80], 8) == [(0, 0, 8)]
    assert [place.first for place in share_out([1] * 9, 4)] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    with pytest.raises(ValueError, match="slices must be at least 1, got 0"):
        share_out([1], 0)


@pytest.mark.parametrize("method", METHODS)
def test_any_slices_score_as_statistics_of_their_text(method, measured):
    """Also where moments of outputs are compacted: 4 slices of outputs with 16 features."""
    slices = Slices(measured, Ranking(method))
    parts = list(measured.slices.values())
    for chosen in ([0], [1, 3], [0, 2, 3], range(len(parts))):
        weights = np.isin(np.arange(len(parts)), chosen).astype(float)
        expected = score(merged([parts[n] for n in chosen]), method)
        found = slices.scores(weights)
        for i, values in expected.items():
            np.testing.assert_allclose(found[i], values, **ROUNDING)
    whole = score(measured, method)
    for i, values in slices.scores(np.ones(len(parts))).items():
        np.testing.assert_allclose(values, whole[i], **ROUNDING)


def test_saved_slices_come_back(tmp_path, measured):
    measured.save(tmp_path / "stats")
    loaded = Stats.load(tmp_path / "stats")
    assert loaded.slices.keys() == measured.slices.keys()
    for key, part in measured.slices.items():
        other = loaded.slices[key]
        assert (part.tokens, part.sequences, part.batches) == (
            other.tokens,
            other.sequences,
            other.batches,
        )
        for i, layer in part.layers.items():
            for name, array in layer.items():
                np.testing.assert_array_equal(array, other.layers[i][name])
    loaded.slices[1, 0].layers[0]["gated_norm"][2] = np.nan
    with pytest.raises(ValueError, match="layer 0: gated_norm holds a NaN"):
        loaded.check_finite()


def test_merging_keeps_shares_apart(measured):
    twice = measured.merge(measured)
    assert twice.slices.keys() == measured.slices.keys()
    assert merged(twice.slices.values()).tokens == 2 * measured.tokens
    # Of a text that was not shared out, slices would not be all.
    assert not measured.merge(dataclasses.replace(measured, slices={})).slices


def test_interrupted_calibration_keeps_its_slices(tmp_path, domains):
    params, config = tiny_model()
    calibrate_domains(params, config, domains, save_as=tmp_path / "whole", digest="d")
    read: list[str] = []

    class Interrupted(list):
        """Batches of a domain, which note that they are read; the second time is cut short."""

        def __iter__(self):
            read.append(self.name)
            if len(read) == 2:
                raise KeyboardInterrupt
            return super().__iter__()

    for name, batches in domains.items():
        domains = {**domains, name: Interrupted(batches)}
        domains[name].name = name
    with pytest.raises(KeyboardInterrupt):
        calibrate_domains(params, config, domains, save_as=tmp_path / "again", digest="d")
    assert len(list(tmp_path.glob("again.partial*.npz"))) == 1
    calibrate_domains(params, config, domains, save_as=tmp_path / "again", digest="d")
    assert read == ["prose", "code", "code", "notes"]
    assert (tmp_path / "whole.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()


def made(
    rng: np.random.Generator, tokens: int, chances, slices=((0, 0),), num_layers: int = 1
) -> Stats:
    """Independent tokens that choose an expert by its chance; norms uniform in [0, 2].

    Args:
        tokens: of each slice.
        chances: by stratum, [E].
    """

    def part(stratum: int) -> Stats:
        layers = {}
        for i in range(num_layers):
            count = rng.multinomial(tokens, chances[stratum])
            norms = [rng.uniform(0, 2, n).sum() for n in count]
            layers[i] = {"count": count, "gated_norm": np.array(norms)}
        return Stats(layers, tokens, 1, 1)

    parts = {key: part(key[0]) for key in slices}
    return dataclasses.replace(merged(parts.values()), facts={}, slices=parts)


EIGHT = tuple((0, share) for share in range(8))
EVEN = [np.full(32, 1 / 32)]


def test_more_text_of_the_same_kind_agrees_more():
    """Scores of 32 equally good experts are all noise, so that nothing but size matters."""
    stats = made(np.random.default_rng(0), 400, EVEN, EIGHT, num_layers=6)
    found = convergence(stats, Ranking("frequency", 0.5))
    assert found.shares == (1 / 8, 1 / 4, 1 / 2, 1)
    assert found.kept == (16,) * 6
    for values in (found.common, found.rank_correlation):
        means = values.mean(1)
        # Correlation of a part's noise with that of all: the root of its share.
        assert (np.diff(means) > 0.03).all()
        np.testing.assert_allclose(values[-1], 1, rtol=1e-12)
    np.testing.assert_allclose(found.rank_correlation.mean(1), np.sqrt(found.shares), atol=0.1)
    assert "calibrate longer" in verdict(found)
    # Where experts differ by far more than noise, an eighth is enough.
    steep = np.geomspace(1, 1000, 16)
    clear = made(np.random.default_rng(0), 100_000, [steep / steep.sum()], EIGHT)
    found = convergence(clear, Ranking("frequency", {0: 12}))
    assert found.common.min() == 1
    assert verdict(found).endswith("between half and all of the text (100.0% stayed): enough.")


def test_the_verdict_turns_at_its_threshold():
    found = convergence(
        made(np.random.default_rng(0), 400, EVEN, EIGHT), Ranking("frequency", 20 / 32)
    )
    for common, enough in ((0.95, True), (0.94, False)):
        told = verdict(dataclasses.replace(found, common=np.full((4, 1), common)))
        assert f"({common:.1%} stayed)" in told
        assert told.endswith("enough.") == enough
        assert f"changed by {20 * (1 - common):.1f} of 20 experts" in told


PAIRS = tuple((stratum, share) for stratum in range(4) for share in range(2))


@pytest.mark.parametrize("method", ["frequency", "reap"])
@pytest.mark.parametrize("slices", [EIGHT, PAIRS], ids=["one stratum", "four strata"])
def test_intervals_hold_the_truth_about_as_often_as_they_should(method, slices):
    """90% of the time, less what few slices cost, plus or minus chance.

    A quantile of the normal distribution in the place of Student's makes it 86% with 7 degrees of
    freedom and 83% with 4. Strata differ much: counted as chance, that would give 100%.
    """
    rng = np.random.default_rng(1)
    strata = 1 + max(stratum for stratum, _ in slices)
    chances = rng.dirichlet(np.full(12, 2.0), strata)
    tokens, trials, held = 2000, 80, []
    mean = np.sum([tokens * chances[stratum] for stratum, _ in slices], axis=0)
    truth = mean if method == "frequency" else np.ones(12)
    for _ in range(trials):
        stats = made(rng, tokens, chances, slices)
        found = score_intervals(stats, Ranking(method), resamples=100, level=0.9)
        assert found.degrees == len(slices) - strata
        held.append((found.low[0] <= truth) & (truth <= found.high[0]))
    assert 0.74 < np.mean(held) < 0.94


def test_probabilities_of_the_other_side():
    """Two experts compete for the last place evenly, the others are decided."""
    counts = np.array([900, 500, 501, 100])
    rng = np.random.default_rng(0)
    stats = made(rng, 8000, [counts / counts.sum()], EIGHT)
    found = score_intervals(stats, Ranking("frequency", {0: 2}))
    assert found.kept[0].sum() == 2
    assert found.other_side[0][[0, 3]].max() == 0
    assert found.other_side[0][1] == found.other_side[0][2] > 0.02
    assert (found.low[0] <= found.score[0]).all()
    assert (found.score[0] <= found.high[0]).all()
    # Who does not compete cannot be kept.
    only = score_intervals(stats, Ranking("frequency", {0: 1}, {0: (2, 3)}))
    assert only.kept[0].tolist() == [False, False, True, False]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_resamples_weigh_as_much_as_the_text(sizes):
    slices = tuple((h, share) for h, size in enumerate(sizes) for share in range(size))
    stats = made(np.random.default_rng(0), 50, [np.full(4, 0.25)] * len(sizes), slices)
    weights = Slices(stats, Ranking("frequency")).resample(300, np.random.default_rng(1))
    for stratum, size in enumerate(sizes):
        own = weights[:, [h == stratum for h, _ in slices]]
        np.testing.assert_allclose(own.sum(1), size)
        # Variance of the mean of n numbers, n - 1 of them drawn: 1 / (n - 1) of theirs.
        expected = (1 - 1 / size) * size / max(size - 1, 1)
        assert size == 1 or abs(own.var() - expected) < 0.35 * expected


def test_an_expert_never_chosen_is_named():
    chances = np.array([0.5, 0.0, 0.49, 0.01])
    stats = made(np.random.default_rng(0), 1000, [chances])
    found = coverage(stats)
    assert found.floor == FLOOR
    assert found.few == ((0, 1, 0), (0, 3, int(stats.layers[0]["count"][3])))
    assert sum(found.histogram) == 3
    assert found.floor in found.edges
    assert found.edges[0] <= stats.layers[0]["count"][3]
    assert stats.layers[0]["count"].max() < found.edges[-1]
    assert (found.busiest[:2], found.uniform) == ((0, 0), 0.25)
    assert coverage(stats, floor=0).few == ()
    told = describe_confidence(stats, "reap", {0: 2})["coverage"]
    assert told["few"][0] == [0, 1, 0]
    assert (told["num_few"], told["experts"]) == (2, 4)


def test_of_one_batch_nothing_can_be_said(domains):
    params, config = tiny_model()
    stats = calibrate_domains(params, config, {"notes": domains["notes"]})
    assert not stats.slices
    found = convergence(stats, Ranking("mone", 0.5))
    assert found.shares == (1.0,)
    assert (found.common == 1).all()
    assert "nothing can be said" in verdict(found)
    intervals = score_intervals(stats, Ranking("mone", 0.5))
    assert intervals.degrees == 0
    for values in (intervals.low, intervals.high, intervals.other_side):
        assert np.isnan(values[0]).all()
        assert values[0].shape == (EXPERTS,)
    told = describe_confidence(stats, "mone", 0.5)
    assert "nothing can be said" in told["verdict"]
    assert "unsure" not in told


def test_a_seed_decides_all():
    stats = made(np.random.default_rng(0), 400, EVEN, EIGHT)
    first, again, other = (
        convergence(stats, Ranking("reap", 0.5, seed=seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.rank_correlation, again.rank_correlation)
    assert (first.rank_correlation != other.rank_correlation).any()
    low = [score_intervals(stats, Ranking("reap", seed=seed)).low[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(low[0], low[1])
    assert (low[0] != low[2]).any()


def test_of_neurons_coverage_alone_is_told(measured):
    for method, keep in (("activation_norm", 0.5), ("slim", None), ("random", 0.5)):
        told = describe_confidence(measured, method, keep)
        assert set(told) == {"verdict", "coverage"}
        assert "coverage alone" in told["verdict"]
    assert describe_confidence(Stats({}, 1, 1, 1), "mone", 0.5) == {}


def test_bad_arguments_are_refused(measured):
    for method in ("activation_norm", "random", "mnoe"):
        with pytest.raises(ValueError, match=f"method must rank experts by text.*got '{method}'"):
            convergence(measured, Ranking(method, 0.5))
    for keep in (0.0, 1.2, {0: 7, 1: 1}):
        with pytest.raises(ValueError, match=f"layer 0: keep must leave between 1 and {EXPERTS}"):
            convergence(measured, Ranking("mone", keep))
    with pytest.raises(ValueError, match="options of mone must be among"):
        convergence(measured, Ranking("mone", 0.5, options={"keep": 1}))
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        score_intervals(measured, Ranking("mone"), resamples=0)
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 1"):
        score_intervals(measured, Ranking("mone"), level=1)
    with pytest.raises(ValueError, match="floor must not be negative, got -1"):
        coverage(measured, -1)
    with pytest.raises(ValueError, match="cover no experts"):
        coverage(Stats({}, 1, 1, 1))


def test_the_command_line_tells_whether_to_calibrate_longer(tmp_path, capsys):
    main = importlib.import_module("moe_jax.calibrate.__main__").main
    save_model(tmp_path / "model", num_hidden_layers=1)
    run = settings(tmp_path)
    config = {name: run[name] for name in ("model", "calibration")}
    config["output"] = str(tmp_path / "stats")
    main(ConfigDict(config), ())
    plain = capsys.readouterr().out
    assert "tokens" in plain
    assert "kept set" not in plain
    main(ConfigDict({**config, "method": "mone", "keep_ratio": 0.75}), ())
    told = capsys.readouterr().out
    assert "kept set the same" in told
    assert "between half and all of the text" in told
    for wrong, message in (
        ({"method": "mone"}, "method and keep_ratio go together"),
        ({"keep_ratio": 0.5}, "method and keep_ratio go together"),
        ({"method": "raep", "keep_ratio": 0.5}, "did you mean 'reap'"),
        ({"method": "taylor_lm", "keep_ratio": 0.5}, "needs 'lm' among importance"),
        ({"method": "mone", "keep_ratio": 2.0}, r"keep_ratio must be in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            main(ConfigDict({**config, **wrong}), ())

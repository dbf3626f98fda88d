"""Budget signals: the paper's formula by hand, the controls by their definitions, and what they have in common."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcompile.analysis.spectrum import analyse
from mpcompile.passes.mp_budget import scores as signals
from mpcompile.passes.mp_budget.allocate import densities

RNG = np.random.default_rng(0)
WEIGHTS = {
    "small": torch.from_numpy(RNG.standard_normal((64, 96))) * 0.5,
    "large": torch.from_numpy(RNG.standard_normal((96, 128))) * 2.0,
    "third": torch.from_numpy(RNG.standard_normal((64, 64))) * 1.0,
}
FITS = {name: analyse(weight.numpy(), null=False).fit for name, weight in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("sparsity", "beta", "vanishes"), [(0.3, 1.0, 0.5), (0.4, 1.0, 0.5), (0.5, 1.25, 0.7), (0.55, 1.25, 0.7)]
)
def test_spectral_edge_budgeting_is_the_papers_formula(sparsity: float, beta: float, vanishes: float) -> None:
    found = signals.spectral_edge(WEIGHTS, FITS, frozenset(), sparsity)
    edges = np.array([FITS[name].sigma * (FITS[name].p ** 0.5 + FITS[name].n ** 0.5) for name in WEIGHTS])
    z = (edges - edges.mean()) / edges.std()
    for name, z_layer in zip(WEIGHTS, z, strict=True):
        w = max(0.1, 1 + beta * (1 - sparsity / vanishes) * z_layer)
        torch.testing.assert_close(found[name], WEIGHTS[name].abs() / w, rtol=1e-12, atol=0)
    # A wide bulk is pruned more than by magnitude alone.
    shares, plain = densities(found, 1 - sparsity), densities({n: w.abs() for n, w in WEIGHTS.items()}, 1 - sparsity)
    assert shares["large"] < plain["large"]
    assert shares["small"] > plain["small"]


def test_the_regimes_are_the_papers() -> None:
    assert signals.regime(0.2).quantity is signals.tail_exponent
    assert signals.regime(0.21).quantity is signals.edge
    high = signals.regime(0.6)
    assert (high.beta_attention, high.beta_other, high.vanishes_at) == (1.0, 2.0, 0.85)
    w = signals.factors({"a": 1.0, "b": 2.0, "c": 3.0}, {"a", "c"}, 0.6)
    d, z = 1 - 0.6 / 0.85, 1.5**0.5
    assert w == pytest.approx({"a": 1 - d * z, "b": 1.0, "c": 1 + d * z})
    assert signals.factors({"a": 1.0, "b": 2.0, "c": 3.0}, set(), 0.6)["c"] == pytest.approx(1 + 2 * d * z)


def test_the_factor_ends_at_a_tenth_and_vanishes_at_its_sparsity() -> None:
    values = {"a": 0.0, **{str(i): 1.0 for i in range(20)}}
    assert signals.factors(values, set(), 0.45)["a"] == 0.1
    assert set(signals.factors(values, set(), 0.9).values()) == {1.0}
    assert signals.factors({"a": 3.0, "b": 3.0}, set(), 0.5) == {"a": 1.0, "b": 1.0}


def test_layers_without_a_fit_are_taken_by_magnitude() -> None:
    known = {name: fit for name, fit in FITS.items() if name != "third"}
    found = signals.spectral_edge(WEIGHTS, known, frozenset(), 0.5)
    assert torch.equal(found["third"], WEIGHTS["third"].abs())


def test_standard_deviation_stands_in_for_the_edge_of_noise() -> None:
    """On noise alone σ₊ is std (√n + √p), so the control and the paper's signal agree."""
    paper, control = (
        signals.spectral_edge(WEIGHTS, FITS, frozenset(), 0.5),
        signals.deviation_edge(WEIGHTS, frozenset(), 0.5),
    )
    for name in WEIGHTS:
        # σ of a 64 × 64 matrix is known to a per cent or two.
        torch.testing.assert_close(paper[name], control[name], rtol=0.05, atol=0)


def test_lamp_is_its_definition() -> None:
    weight = torch.tensor([[3.0, -1.0], [2.0, 0.0]])
    expected = torch.tensor([[9 / 9, 1 / 14], [4 / 13, 0.0]]).sqrt()
    torch.testing.assert_close(signals.lamp(weight), expected)


def test_owl_gives_more_to_layers_with_outliers() -> None:
    weights = {name: weight.clone() for name, weight in WEIGHTS.items()}
    weights["third"][:4] *= 30
    scales = {name: torch.ones_like(weight) for name, weight in weights.items()}
    found = densities(signals.owl(weights, scales), 0.5)
    assert found["third"] - found["small"] == pytest.approx(2 * signals.OWL_SPREAD, abs=0.01)
    shares = {name: signals.outliers(weights[name], scales[name]) for name in weights}
    assert shares["third"] > shares["small"] == 0.0


@given(st.sampled_from([0.3, 0.5, 0.7, 0.9]))
def test_uniform_is_uniform(density: float) -> None:
    found = densities({name: signals.rank(weight) for name, weight in WEIGHTS.items()}, density)
    for name, share in found.items():
        assert share == pytest.approx(density, abs=1 / WEIGHTS[name].numel() + 1e-3)


@pytest.mark.parametrize("signal", ["mp", "std", "magnitude", "uniform", "lamp", "owl", "sensitivity"])
@pytest.mark.parametrize("density", [0.35, 0.5, 0.75])
def test_every_signal_orders_a_layer_by_magnitude_and_meets_the_density(signal: str, density: float) -> None:
    scales = {name: torch.ones_like(weight) for name, weight in WEIGHTS.items()}
    found = {
        "mp": lambda: signals.spectral_edge(WEIGHTS, FITS, frozenset(), 1 - density),
        "std": lambda: signals.deviation_edge(WEIGHTS, frozenset(), 1 - density),
        "magnitude": lambda: {name: weight.abs() for name, weight in WEIGHTS.items()},
        "uniform": lambda: {name: signals.rank(weight) for name, weight in WEIGHTS.items()},
        "lamp": lambda: {name: signals.lamp(weight) for name, weight in WEIGHTS.items()},
        "owl": lambda: signals.owl(WEIGHTS, scales),
        "sensitivity": lambda: signals.sensitivity(WEIGHTS, {"small": 4.0, "large": 1.0, "third": 0.25}),
    }[signal]()
    for name, score in found.items():
        assert score.shape == WEIGHTS[name].shape
        assert (score >= 0).all()
        order = WEIGHTS[name].abs().flatten().argsort()
        assert (score.flatten()[order].diff() >= 0).all()
    shares = densities(found, density)
    total = sum(share * WEIGHTS[name].numel() for name, share in shares.items())
    wanted = round(density * sum(weight.numel() for weight in WEIGHTS.values()))
    # Ranks of different layers can be equal; equal scores are removed together.
    assert wanted - len(WEIGHTS) * (signal == "uniform") <= total <= wanted

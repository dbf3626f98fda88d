"""Gains give a refitted channel the dense variance, and change nothing where nothing was lost."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask
from mpcompile.passes.reconstruct.channel_gain import LARGEST_GAIN, channel_gains
from mpcompile.passes.reconstruct.second_moments import SecondMoments
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import tiny_cnn, tiny_data, tiny_mlp


@given(st.integers(0, 10_000), st.floats(0.05, 3))
@settings(max_examples=30)
def test_the_variance_is_that_of_the_dense_outputs(seed: int, noise: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    layer = nn.Linear(8, 5)
    x = torch.randn(300, 8, generator=rng) + 1
    y = x @ torch.randn(8, 5, generator=rng) + noise * torch.randn(300, 5, generator=rng)
    moments = SecondMoments()
    moments.add(layer, x, y)
    problem = moments.problem(centred=True)
    weight = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution.T.double()
    gains = channel_gains(problem.outputs(weight), problem.power)
    assert bool((gains >= 1 - 1e-6).all())  # least squares never raises a variance
    wanted = (y.double().var(0) / (x.double() @ weight.T).var(0)).sqrt().clamp(max=LARGEST_GAIN)
    # Moments are sums of float32 products.
    torch.testing.assert_close(gains, wanted, rtol=1e-4, atol=1e-5)


def test_nothing_lost_and_constant_channels_have_gain_one() -> None:
    layer = nn.Linear(8, 3)
    x = torch.randn(100, 8)
    y = (x @ layer.weight.T).detach()
    y[:, 2] = 4.0
    moments = SecondMoments()
    moments.add(layer, x, y)
    problem = moments.problem(centred=True)
    weight = layer.weight.detach().double().clone()
    assert channel_gains(problem.outputs(weight), problem.power)[:2].tolist() == [1, 1]
    assert channel_gains(problem.outputs(torch.zeros_like(weight)), problem.power).tolist() == [1, 1, 1]


def test_masked_channels_have_the_dense_variance_and_mean() -> None:
    model = tiny_cnn()
    data = tiny_data(model)
    images = data.calibration.first(len(data.calibration))
    outputs = {}
    for gain in (False, True):
        result, _ = PassManager([NMMask(NM(2, 4), gain=gain)]).run(model, data)
        layer = result.layer("body")
        seen: list[torch.Tensor] = []
        handle = layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.detach()))
        result(images)
        handle.remove()
        outputs[gain] = seen[0].movedim(1, -1).flatten(0, -2).double()
    dense: list[torch.Tensor] = []
    handle = model.layer("body").register_forward_hook(lambda module, args, output: dense.append(output.detach()))
    model(images)
    handle.remove()
    wanted = dense[0].movedim(1, -1).flatten(0, -2).double()
    free = (outputs[True].var(0) / outputs[False].var(0)).sqrt() < LARGEST_GAIN - 1e-3
    assert bool(free.any())
    # Moments are sums of float32 products, and weights are stored in float32.
    torch.testing.assert_close(outputs[True].var(0)[free], wanted.var(0)[free], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(outputs[True].mean(0), wanted.mean(0), rtol=1e-3, atol=1e-4)


def test_other_refits_have_no_gain() -> None:
    model = tiny_mlp()
    data = tiny_data(model)
    for refit in ("layer", "none"):
        one, other = (
            PassManager([NMMask(NM(2, 4), "wanda", refit, gain=gain)]).run(model, data)[0] for gain in (True, False)
        )
        for name, value in one.graph.state_dict().items():
            assert torch.equal(value, other.graph.state_dict()[name])

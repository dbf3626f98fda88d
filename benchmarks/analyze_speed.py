"""Time of the spectrum fits of a ViT-B/16, compared with WeightWatcher -> results/analyze_speed.{json,md}.

    pip install weightwatcher && python benchmarks/analyze_speed.py

Weights are random, since the time does not depend on them. Both programs fit every Linear and Conv2d that they support.
They run alternately, and the medians of ROUNDS runs are compared. The error of σ is measured on Gaussian matrices with
known σ.
"""

import time
import warnings
from collections.abc import Callable

import numpy as np
import timm
import torch
from lib.common import RESULTS, markdown, write

from mpcompile.analysis.spectrum import analyse
from mpcompile.driver.analyze import analyze
from mpcompile.frontend.capture import capture
from mpcompile.frontend.load_model import Request
from mpcompile.frontend.preprocessing import source_of
from mpcompile.passes import MPBudget
from mpcompile.passes.mp_budget.mp_budget import fit_spectra

ARCH = "vit_base_patch16_224"
ROUNDS = 3
SHAPES = ((128, 128), (128, 512), (256, 1024), (512, 512))
SIGMA = 0.02
QUESTION = "How long do the spectrum fits of a ViT-B/16 take, and how accurate is the fitted σ?"


def seconds(call: Callable[[], object]) -> float:
    """Returns the wall seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def weightwatcher_sigmas(weights: list["np.ndarray"]) -> list[float]:
    """Returns σ of each matrix as fitted by WeightWatcher."""
    import weightwatcher

    layers = torch.nn.Sequential(*[torch.nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights])
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data = torch.from_numpy(weight)
    details = weightwatcher.WeightWatcher(model=layers).analyze(mp_fit=True, min_evals=10)
    # WeightWatcher's σ is for eigenvalues of W Wᵀ / n rescaled to unit mean square; the factor undoes the rescaling.
    return [
        float(sigma) * float(np.sqrt((w.astype(np.float64) ** 2).mean()))
        for sigma, w in zip(details["sigma_mp"], weights, strict=True)
    ]


def main() -> None:
    """Measures, and writes both results files."""
    warnings.simplefilter("ignore")
    import weightwatcher

    torch.manual_seed(0)
    module = timm.create_model(ARCH)
    model = capture(module, source_of(module, name=ARCH, arch=ARCH, sha256=""))
    calls: dict[str, Callable[[], object]] = {
        "mpcompile analyze, no null": lambda: analyze(Request(f"timm:{ARCH}"), MPBudget(null=False)),
        "mpcompile analyze, with null": lambda: analyze(Request(f"timm:{ARCH}")),
        "mpcompile, the fits alone": lambda: fit_spectra(model, null=False, level=0.05, seed=0),
        "mpcompile, the fits and their nulls": lambda: fit_spectra(model, null=True, level=0.05, seed=0),
        "WeightWatcher analyze(mp_fit=True)": lambda: weightwatcher.WeightWatcher(model=module).analyze(mp_fit=True),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call))
            print(name, round(times[name][-1], 2), flush=True)
    rng = np.random.default_rng(0)
    weights = [(rng.standard_normal(shape) * SIGMA).astype(np.float32) for shape in SHAPES for _ in range(5)]
    ours = [analyse(w, null=False).fit.sigma for w in weights]
    errors = {
        "mpcompile": [abs(sigma / SIGMA - 1) for sigma in ours],
        "WeightWatcher": [abs(sigma / SIGMA - 1) for sigma in weightwatcher_sigmas(weights)],
    }
    rows = [
        {"what": name, "median_seconds": float(np.median(values)), "seconds": values} for name, values in times.items()
    ]
    rows += [{"what": f"σ by {name}", "mean_error": float(np.mean(e)), "worst": max(e)} for name, e in errors.items()]
    write("analyze_speed", QUESTION, "cpu", ("torch", "scipy", "weightwatcher"), rows)
    baseline = float(np.median(times["WeightWatcher analyze(mp_fit=True)"]))
    table = markdown(
        ("what", "seconds, median of 3", "times as fast as WeightWatcher"),
        [(name, f"{np.median(v):.1f}", f"{baseline / np.median(v):.1f}") for name, v in times.items()],
    )
    accuracy = markdown(
        ("σ by", "mean error", "worst"), [(name, f"{np.mean(e):.2%}", f"{max(e):.2%}") for name, e in errors.items()]
    )
    (RESULTS / "analyze_speed.md").write_text(f"# Speed of the analysis\n\n{table}\n{accuracy}", encoding="utf-8")
    print(table, accuracy)


if __name__ == "__main__":
    main()

"""Whether runs can be compared: other dense models, images, machines, runtimes or settings, as sentences."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from mpcompile.report.compared_schema import Aspect, Difference
from mpcompile.report.schema import Report
from mpcompile.report.speed_tile import baseline_name

# Facts of the environment that do not belong to the runtime. All others, such as onnxruntime, are its versions.
MACHINE = ("processor", "cores", "system", "device")
PREPARING = ("python", "torch", "timm", "onnx", "onnxscript", "threads of PyTorch", "passes")
SAME_STATE = 1.1  # ratio of the dense model's medians in two runs; above it the machine was in another state
IMAGES = "the evaluation images"
DIGITS = 12  # of a hash that are shown


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact of a run: `value` decides whether two runs agree, `shown` is its text."""

    name: str
    spoils: tuple[Aspect, ...]
    value: str | None  # None: the run does not have it, which is no difference
    shown: str


def dense_identity(report: Report) -> str:
    """A text that is equal for two runs whose dense models are the same."""
    part = report.part.name if report.part else ""
    return f"{report.model.sha256} {report.model.arch} {part} {baseline_name(report)}"


def facts(report: Report, by_hash: bool) -> tuple[Fact, ...]:
    """The facts on which the values of a run depend beside its recipe. `by_hash`: whether its images have a hash."""
    source, recipe, c = report.model, report.recipe, report.comparison
    part = f", part {report.part.name}" if report.part else ""
    dense = f"{source.name}{part}, {baseline_name(report)}, SHA-256 {source.sha256[:DIGITS]}"
    judge = None
    if c is not None:
        rule = str(c.head) if c.head is None else f"{c.head.kind}, threshold {c.head.threshold}"
        judge = rule if c.metric is None else f"metric {c.metric.name}"
    machine = ", ".join(f"{report.environment.get(key, '?')}{' cores' * (key == 'cores')}" for key in MACHINE)
    names = sorted(set(report.environment) - {*MACHINE, *PREPARING})
    runtime = ", ".join(f"{name} {report.environment[name]}" for name in names) or "none recorded"
    threads = "its own choice" if recipe.bench.threads is None else str(recipe.bench.threads)
    target = f"{recipe.target}, {recipe.batch or 'dynamic'} batch"
    images, shown = _images(report, by_hash)
    return (
        Fact("the dense models", ("accuracy", "speed", "size"), dense_identity(report), dense),
        Fact(IMAGES, ("accuracy",), images, shown),
        Fact("the decisions that count as right", ("accuracy",), judge, judge or ""),
        Fact("the targets", ("speed",), target, target),
        Fact("the machines", ("speed",), machine, machine),
        Fact("the versions of the runtime", ("speed",), runtime, runtime),
        Fact("the threads of the runtime", ("speed",), threads, threads),
    )


def _images(report: Report, by_hash: bool) -> tuple[str | None, str]:
    """What identifies the evaluation images, and its text: their hash, or else everything that is known about them."""
    c, s = report.comparison, report.model
    if c is None:
        return None, ""
    if by_hash:
        return c.images_sha256, f"{c.count:,} images, SHA-256 {(c.images_sha256 or '')[:DIGITS]}"
    dense = "no labels" if c.dense is None else f"dense top-1 {100 * c.dense.top1:.6g} %"
    shape = "×".join(map(str, s.size))
    prepared = f"{shape}, {s.interpolation}, crop {s.crop_pct:g}, mean {s.mean}, deviation {s.std}, {s.channel_order}"
    return f"{c.count} {report.data.seed} {dense} {prepared}", f"{c.count:,} images, seed {report.data.seed}, {dense}"


def differences(names: Sequence[str], reports: Sequence[Report]) -> tuple[Difference, ...]:
    """One entry for each fact in which the runs differ; empty if all of them can be compared in everything."""
    by_hash = _all_hashed(reports)
    found = []
    for row in zip(*(facts(report, by_hash) for report in reports), strict=True):
        if len({fact.value for fact in row if fact.value is not None}) > 1:
            found.append(_difference(names, row))
    return tuple(found)


def _all_hashed(reports: Sequence[Report]) -> bool:
    return all(report.comparison is None or report.comparison.images_sha256 for report in reports)


def _difference(names: Sequence[str], row: Sequence[Fact]) -> Difference:
    """The difference in one fact; `row` has it for each run. Facts that look alike are told apart by their hash."""
    first = row[0]
    runs: dict[str | None, list[str]] = {}
    texts: dict[str | None, str] = {}
    for name, fact in zip(names, row, strict=True):
        runs.setdefault(fact.value, []).append(name)
        texts[fact.value] = fact.shown
    told = "; ".join(f"{', '.join(runs[value])}: {texts[value]}" for value in runs if value is not None)
    *others, last = first.spoils
    aspects = f"{', '.join(others)} and {last}" if others else last
    return Difference(
        fact=first.name,
        spoils=first.spoils,
        values=tuple(None if fact.value is None else fact.shown for fact in row),
        sentence=f"Not comparable in {aspects}: {first.name} differ. {told}.",
    )


def remarks(names: Sequence[str], reports: Sequence[Report]) -> tuple[str, ...]:
    """What is uncertain about a comparison although no fact differs, as sentences."""
    found = []
    unhashed = [n for n, r in zip(names, reports, strict=True) if r.comparison and not r.comparison.images_sha256]
    if unhashed and len(reports) > 1:
        found.append(
            f"{', '.join(unhashed)}: an earlier version wrote the report, without a hash of the evaluation images. "
            "Their number, seed, preprocessing and dense accuracy are compared instead."
        )
    found += _versions(names, reports)
    found += _states(names, reports)
    return tuple(found)


def _versions(names: Sequence[str], reports: Sequence[Report]) -> list[str]:
    """Versions that change masks and weights, but do not make two results incomparable."""
    values = [
        f"mpcompile {report.version}, "
        + ", ".join(f"{key} {report.environment[key]}" for key in ("torch", "timm") if key in report.environment)
        for report in reports
    ]
    if len(set(values)) == 1:
        return []
    row = [Fact("", ("accuracy",), value, value) for value in values]
    told = _difference(names, row).sentence.partition("differ. ")[2]
    return [f"The runs were compiled with different versions, which can change masks. {told}"]


def _states(names: Sequence[str], reports: Sequence[Report]) -> list[str]:
    """Pairs of runs on one machine in which the dense model itself took a different time."""
    hashed = _all_hashed(reports)
    for (one, first), (other, second) in combinations(zip(names, reports, strict=True), 2):
        same = (
            fact for fact in zip(facts(first, hashed), facts(second, hashed), strict=True) if "speed" in fact[0].spoils
        )
        if any(replace(a, shown="") != replace(b, shown="") for a, b in same):
            continue  # told as a difference
        theirs = {pair.dense.batch: pair.dense for pair in second.latency}
        for mine in (pair.dense for pair in first.latency):
            your = theirs.get(mine.batch)
            if your is None:
                continue
            fast, slow = sorted((mine, your), key=lambda timing: timing.p50_ms)
            if slow.p50_ms > SAME_STATE * fast.p50_ms and slow.interval_ms[0] > fast.interval_ms[1]:
                return [
                    f"The same dense model took {mine.p50_ms:.3g} ms at batch {mine.batch} in {one} and "
                    f"{your.p50_ms:.3g} ms in {other}: the machine was in another state. Compare the speedups, which "
                    "are ratios within a run, and not the milliseconds."
                ]
    return []

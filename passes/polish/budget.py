"""How many steps a training of given minutes has, and what they are spent on.

The number of steps is decided once, from the measured time of a step, and then kept in the run's work folder. All else
follows from it: so a resumed run takes the same steps, and a recipe with `steps` the same on every machine.
"""

from dataclasses import dataclass

PROBE_SHARE = 0.2  # of the steps, for the comparison of learning rates
LONGEST_PROBE = 40  # steps for each rate
FEWEST = 8  # steps; fewer are not worth a training
CHECKS, MOST_CHECKS, STEPS_BETWEEN = 4, 20, 40  # of the validation images during the training


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Steps of a training.

    Attributes:
        probe: steps for each learning rate that is tried; 0 if there are too few.
        training: steps with the chosen rate.
        interval: steps between two checks on validation images.
    """

    probe: int
    training: int
    interval: int

    @property
    def checks(self) -> int:
        """The number of checks in the training."""
        return -(-self.training // self.interval)


def step_plan(steps: int, rates: int) -> StepPlan:
    """The plan of `steps` steps in all; `rates` learning rates are tried first, none if there is only one."""
    probe = min(LONGEST_PROBE, int(PROBE_SHARE * steps) // rates) if rates > 1 else 0
    training = steps - rates * probe
    checks = min(MOST_CHECKS, max(CHECKS, training // STEPS_BETWEEN))
    return StepPlan(probe, training, max(1, -(-training // checks)))


def affordable_steps(
    seconds: float, step_seconds: float, check_seconds: float, trial_seconds: float, rates: int
) -> int:
    """The largest number of steps found whose training and checks take no more than `seconds`; 0 if none do.

    `check_seconds` is the time of a check, `trial_seconds` that of the comparison after a learning rate was tried.
    """

    def cost(steps: int) -> float:
        plan = step_plan(steps, rates)
        tried = rates * trial_seconds if plan.probe else 0.0
        return steps * step_seconds + plan.checks * check_seconds + tried

    most = max(0, int(seconds / max(step_seconds, 1e-6)))
    # The cost does not rise everywhere: one step more can mean one check less. What is found fits the time anyway.
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= seconds else (low, middle - 1)
    return low

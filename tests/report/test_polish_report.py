"""The sentence of a report on the pass polish."""

from dataclasses import replace

from mpcompile.driver.artifact import Artifact
from mpcompile.ir.results import Closeness, Polished, RateTrial
from mpcompile.report.polish_sentences import on_polish
from mpcompile.report.schema import Report

START, END = Closeness(0.373, 1.96, 0.7825), Closeness(0.341, 1.4, 0.8)
TRIALS = (RateTrial(2e-4, 6, END), RateTrial(6e-4, 6, END), RateTrial(2e-3, 6, None))
TRAINED = Polished(3.0, 100, 82, 16, (3, 160, 160), 6e-4, TRIALS, 600, 128, START, END, None)


def test_the_sentence_has_minutes_steps_rate_and_both_measures() -> None:
    [sentence] = on_polish(TRAINED)
    assert sentence == (
        "A polish of at most 3 minutes trained 82 steps of 16 images at a learning rate of 0.0006 of a weight's size, "
        "after 18 steps that tried learning rates: on 128 validation images, the divergence from the dense model, with "
        "the best factor on the logits, goes from 0.373 nats to 0.341 nats and the agreement from 78.25% to 80.00%. "
        "Masks are the same as before."
    )
    values = replace(TRAINED, before=Closeness(0.2, None, None), after=Closeness(0.1, None, None), trials=())
    [sentence] = on_polish(values)
    assert "the relative squared error goes from 0.2 to 0.1." in sentence
    assert "agreement" not in sentence
    assert on_polish(None) == ()


def test_a_start_that_was_kept_is_said() -> None:
    [sentence] = on_polish(replace(TRAINED, kept_start="no check was better"))
    assert sentence.startswith("The polish left the model as it was: no check was better. Its divergence")
    assert sentence.endswith("is 0.373 nats on 128 validation images.")


def test_the_report_is_read_back(artifact: Artifact) -> None:
    report = artifact.report.model_copy(update={"polished": TRAINED})
    assert Report.model_validate_json(report.model_dump_json()).polished == TRAINED

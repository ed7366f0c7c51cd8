"""Classes of transformers, built small: decoded exactly in every plan, or refused; nothing in between.

``make test`` takes some that differ most, ``make test-slow`` every model type. The committed table is of all of them.
"""

import os
import sys

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "examples" / "architectures"
sys.path.insert(0, str(FOLDER))
import survey  # noqa: E402
import tiny  # noqa: E402

sys.path.pop(0)

FULL = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
NEVER_FILLED = "a window that the context never fills"
SOME = {
    ("mistral", "as it is"): "refused",
    ("mistral", "use_sliding_window false beside a window"): "refused",  # the class has no such switch
    ("mistral", NEVER_FILLED): "exact",
    ("afmoe", NEVER_FILLED): "exact",  # takes a view of what attention returns
    ("doge", "as it is"): "refused",  # a mask of its own
    ("phi3", "rope longrope"): "refused",  # its length is at the top level of the configuration
    ("llama", "rope yarn"): "exact",
}


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "variant"), list(SOME))
def test_some_configurations(model_type, variant):
    changes = survey.variants(model_type)[variant]
    assert survey.outcome_of(model_type, variant, changes).outcome == SOME[model_type, variant]


@pytest.mark.parametrize("model_type", tiny.model_types() if FULL else [])
def test_every_model_type_is_exact_or_refused(model_type):
    try:
        variants = survey.variants(model_type)
    except tiny.NotBuiltError:
        return
    outcomes = [survey.outcome_of(model_type, name, changes) for name, changes in variants.items()]
    assert not [one for one in outcomes if one.outcome == "DIFFERS"]


def test_the_table_is_of_every_model_type():
    rows = [line.split(" | ")[0].removeprefix("| ") for line in (FOLDER / "README.md").read_text().splitlines()]
    assert set(tiny.model_types()) <= set(rows)
    assert "DIFFERS" not in (FOLDER / "README.md").read_text().split("\n| ", 1)[1]


def test_a_difference_is_found(monkeypatch):
    """The survey can fail: with a check that accepts everything, a window is seen."""
    monkeypatch.setattr("tidar_megatron.inference.wrapping.check_compatible", lambda model: None)
    monkeypatch.setattr("tidar_megatron.inference.attention._refuse_unknown", lambda *arguments: None)
    assert survey.outcome_of("mistral", "as it is", {}).outcome == "DIFFERS"

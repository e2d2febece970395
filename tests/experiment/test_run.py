"""What a run tells of its steps, also where one call makes several."""

import numpy as np
import pytest

from mtl_jax.errors import UserError
from mtl_jax.experiment import loop
from mtl_jax.experiment.console import Console
from tests.experiment.conftest import make, records

SEVERAL = {"data.engine": "resident", "train.steps_per_call": 4}


@pytest.mark.parametrize("several", [{}, SEVERAL], ids=["one", "several"])
def test_a_run_that_diverges_names_its_step_and_what_was_kept(tmp_path, several):
  with pytest.raises(UserError) as caught:
    loop.train(make(**several, **{"optimizer.name": "sgd", "optimizer.learning_rate": 1e18}),
               tmp_path / "run")
  assert str(caught.value).startswith(
      "step 2: expected finite losses and gradients, found the loss or gradient of task a and b "
      "not finite; no checkpoint yet\n")


def test_the_losses_shown_are_those_of_the_last_step(tmp_path, monkeypatch):
  shown = {}
  monkeypatch.setattr(Console, "advance", lambda self, done, losses, tasks: shown.update(
      {done: losses}))
  loop.train(make(**SEVERAL, **{"train.log_every_steps": 1}), tmp_path / "run")
  written = {r["step"]: [r["a/loss"], r["b/loss"]] for r in records(tmp_path / "run")
             if r["split"] == "train"}
  assert sorted(shown) == [4, 5, 8, 10, 12]
  for step, losses in shown.items():
    np.testing.assert_allclose(losses, written[step], rtol=1e-6)

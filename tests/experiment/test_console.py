"""What the console says of sample data."""

import pytest

from mtl_jax.experiment.console import Console


@pytest.mark.parametrize("data, banners, photographs", [
    ({"a": "tfds:cifar10:3.0.2"}, 0, False),
    ({"a": "sample", "b": "sample"}, 1, False),
    ({"a": "sample:digit_scenes"}, 1, True),
    ({"a": "sample", "b": "sample:digit_scenes", "c": "samples of mine"}, 2, True),
])
def test_sample_data_is_named_in_banner_and_table(capsys, data, banners, photographs):
  console = Console()
  console.data_banner(data)
  banner = capsys.readouterr().out
  assert banner.count("SAMPLE DATA") == banners
  assert ("not CIFAR" in banner) == ("sample" in data.values())
  assert ("photographs" in banner) == photographs
  for stream, origin in data.items():
    assert (f"stream {stream}: {origin}" in banner) == (origin != "sample")
  console.summary({"data": data, "best_step": 1, "validation": {}, "test": {}}, ())
  assert ("SAMPLE DATA" in capsys.readouterr().out) == (banners > 0)

"""`shrink` on random graphs: see support/random_graphs.py; tools/shrink_fuzz.py tries far more."""

from collections import Counter

import pytest
import shrink_fuzz


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_outputs_stay_and_dead_channels_go(first):
    found = Counter(shrink_fuzz.outcome(seed)[0] for seed in range(first, first + 50))
    assert not [text for text in found if text.startswith("WRONG")]
    assert found["smaller"] >= 10

"""network_multiplier of a dataset: how strong the network is on its batches, and that nothing else sees it."""

from types import SimpleNamespace

import pytest
import torch

from library.options import OptionError
from tests.network_targets import ready


@pytest.fixture
def made(tiny_bundle):
    return ready(tiny_bundle)[0]

"""Marks that several files of tests need."""

from __future__ import annotations

import sys

import pytest

pauses = pytest.mark.skipif(sys.platform != "linux", reason="what is timed is paused on Linux only")

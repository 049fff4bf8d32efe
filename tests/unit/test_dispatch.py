"""The check that the SDK is the one that the dispatcher was written for."""

from __future__ import annotations

import runpod
from runpod.serverless.modules import rp_scale

from coldsnap import dispatch


def test_the_installed_sdk_is_the_tested_one() -> None:
    assert dispatch.differs(runpod.__version__, rp_scale.JobScaler) is None


def test_another_release_is_not_overridden() -> None:
    assert dispatch.differs("1.13.0", rp_scale.JobScaler) == "not a tested release"


def test_a_scaler_without_what_is_overridden_is_left_alone() -> None:
    class JobScaler:
        def run(self) -> None: ...

    complaint = dispatch.differs(runpod.__version__, JobScaler)
    assert complaint == "JobScaler has no handle_job, stop_job, kill_worker"

"""Every situation of a key's row, and what comes next."""

import pytest
from msgspec.structs import replace

from keepwarm.client.decision import Policy, Row, Step, decide

NOW = 1_000_000.0
POLICY = Policy(ttl_s=400)  # renewed in its last 100 seconds
READY = Row("a", cache_id="cache-1", ready=True, expires_at=NOW + 300)
PENDING = replace(READY, ready=False)
NONE = Row("a")
LATER, CLAIMED = {"next_at": NOW + 1}, {"claim": "claim-1", "claimed_until": NOW + 1}


@pytest.mark.parametrize(
    "row, expected",
    [
        (None, Step.CREATE),
        (NONE, Step.CREATE),
        (replace(NONE, **LATER), Step.FULL),
        (replace(NONE, **CLAIMED), Step.FULL),
        (replace(NONE, claim="claim-1", claimed_until=NOW), Step.CREATE),
        (READY, Step.USE),
        (replace(READY, **LATER), Step.USE),
        (replace(READY, **CLAIMED), Step.USE),
        (PENDING, Step.CHECK),
        (replace(PENDING, **LATER), Step.FULL),
        (replace(PENDING, **CLAIMED), Step.FULL),
        (replace(READY, expires_at=NOW + 99), Step.RENEW),
        (replace(READY, expires_at=NOW + 99, **CLAIMED), Step.USE),
        (replace(READY, expires_at=NOW + 99, **LATER), Step.USE),
        (replace(READY, expires_at=NOW), Step.RENEW),
        (replace(READY, expires_at=NOW, **CLAIMED), Step.FULL),
        (replace(READY, expires_at=NOW, **LATER), Step.FULL),
        (replace(PENDING, expires_at=NOW + 99), Step.RENEW),
        (replace(READY, digest="b"), Step.CREATE),
        (replace(READY, digest="b", **CLAIMED), Step.FULL),
        (replace(READY, digest="b", **LATER), Step.FULL),
        (replace(READY, digest="b", replaced_digest="a", replaced_at=NOW - 299), Step.FULL),
        (replace(READY, digest="b", replaced_digest="a", replaced_at=NOW - 300), Step.CREATE),
        (replace(READY, digest="b", replaced_digest="c", replaced_at=NOW), Step.CREATE),
    ],
)
def test_what_comes_next(row, expected):
    assert decide(row, "a", NOW, POLICY) is expected


@pytest.mark.parametrize("wrong", [{"ttl_s": 0}, {"renew_share": 0.0}, {"renew_share": 1.0}])
def test_a_policy_that_cannot_work_is_refused(wrong):
    with pytest.raises(ValueError):
        Policy(**wrong)

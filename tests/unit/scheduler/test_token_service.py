"""TokenService: who was served least, and what those are owed who were away."""

from scalellm.services.scheduler.token_service import TokenService


def test_a_tenant_that_was_away_is_owed_no_more_than_a_short_request():
    service = TokenService()
    service.enter(b"flood")
    service[b"flood"].charge(1_000_000)
    service.enter(b"quiet")
    assert service.served(b"quiet") == 1_000_000 - 4096
    service[b"quiet"].charge(10_000)
    service.leave(b"quiet")
    service[b"flood"].charge(1_000)
    service.enter(b"quiet")
    assert service.served(b"quiet") == 1_000_000 - 4096 + 10_000, "leaving pays no debts"
    service.leave(b"quiet")
    service[b"flood"].charge(1_000_000)
    service.enter(b"quiet")
    assert service.served(b"quiet") == 2_001_000 - 4096


def test_nobody_is_remembered_when_all_have_left():
    service = TokenService()
    for tenant in (b"a", b"b"):
        service.enter(tenant)
        service[tenant].charge(100)
    for tenant in (b"a", b"b"):
        service.leave(tenant)
    service.enter(b"a")
    assert (service.served(b"a"), service.num_active) == (0.0, 1)


def test_weights_divide_what_is_charged_and_held():
    service = TokenService()
    service.enter(b"a", 1.0)
    service.enter(b"b", 4.0)
    for tenant, rows in ((b"a", 2), (b"b", 4)):
        service[tenant].charge(400)
        service[tenant].num_rows = rows
    assert service.served(b"a") == 400
    assert service.served(b"b") == 100
    assert service.richest()[0] == b"a"
    assert service[b"b"].rows_per_weight(4) == 2.0


def test_the_credit_of_one_that_was_away_is_in_tokens_whatever_its_weight():
    for weight in (0.5, 1.0, 8.0):
        service = TokenService()
        service.enter(b"flood")
        service[b"flood"].charge(1_000_000)
        service.enter(b"quiet", weight)
        service[b"quiet"].charge(4096)
        assert service.served(b"quiet") == service.served(b"flood"), weight


def test_it_remembers_no_more_than_it_needs():
    service = TokenService()
    service.enter(b"always")
    for number in range(1000):
        service.enter(b"%d" % number)
        service[b"%d" % number].charge(1000)
        service[b"always"].charge(10_000)
        service.leave(b"%d" % number)
    assert len(service._idle) < 70

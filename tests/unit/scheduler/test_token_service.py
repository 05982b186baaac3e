"""TokenService: who was served least, and what those are owed who were away."""

from types import SimpleNamespace

from scalellm.services.scheduler.token_service import TokenService


def serve(service: TokenService, tenant: bytes, cost: int) -> None:
    """Dispatch a request of so many prompt tokens."""
    executor = SimpleNamespace(num_rows=0, charged_tokens=cost)
    service.on_dispatch(SimpleNamespace(tenant=tenant, executor=executor), is_first=True)


def test_a_tenant_that_was_away_is_owed_no_more_than_a_short_request():
    service = TokenService()
    service.enter(b"flood")
    serve(service, b"flood", 1_000_000)
    service.enter(b"quiet", waiting=[b"flood"])
    assert service.served(b"quiet") == 1_000_000 - 4096
    serve(service, b"quiet", 10_000)
    service.leave(b"quiet")
    service[b"flood"].charge(1_000)
    service.enter(b"quiet", waiting=[b"flood"])
    assert service.served(b"quiet") == 1_000_000 - 4096 + 10_000, "leaving pays no debts"
    service.leave(b"quiet")
    service[b"flood"].charge(1_000_000)
    service.enter(b"quiet", waiting=[b"flood"])
    assert service.served(b"quiet") == 2_001_000 - 4096


def test_a_tenant_that_always_asks_for_little_saves_up_no_more():
    """Nor do those that come later begin where it is."""
    service = TokenService()
    service.enter(b"light")
    service.enter(b"batch")
    for _ in range(100):
        serve(service, b"batch", 100_000)
        service.enter(b"light")  # nobody waits
        serve(service, b"light", 10)
        service.leave(b"light")
    for waiting in ([], [b"batch"]):
        service.enter(b"light", waiting=waiting)
        assert service.served(b"light") >= 9_900_000 - 4096
    service.enter(b"new", waiting=[b"batch"])
    assert service.served(b"new") == 10_000_000 - 4096


def test_a_tenant_whose_requests_wait_keeps_its_account():
    service = TokenService()
    service.enter(b"flood")
    serve(service, b"flood", 1_000_000)
    service.enter(b"waits", waiting=[b"flood"])
    service[b"flood"].charge(1_000_000)
    service.enter(b"waits", waiting=[b"flood", b"waits"])
    assert service.served(b"waits") == 1_000_000 - 4096


def test_nobody_is_remembered_when_all_have_left():
    service = TokenService()
    for tenant in (b"a", b"b"):
        service.enter(tenant)
        serve(service, tenant, 100)
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
    assert service.by_rows() == [b"a", b"b"]
    assert service[b"b"].rows_per_weight(4) == 2.0


def test_the_credit_of_one_that_was_away_is_in_tokens_whatever_its_weight():
    for weight in (0.5, 1.0, 8.0):
        service = TokenService()
        service.enter(b"flood")
        service[b"flood"].charge(1_000_000)
        service.enter(b"quiet", weight, waiting=[b"flood"])
        service[b"quiet"].charge(4096)
        assert service.served(b"quiet") == service.served(b"flood"), weight


def test_it_remembers_no_more_than_it_needs():
    service = TokenService()
    service.enter(b"always")
    for number in range(1000):
        service.enter(b"%d" % number, waiting=[b"always"])
        service[b"%d" % number].charge(1000)
        service[b"always"].charge(10_000)
        service.leave(b"%d" % number)
    assert len(service._idle) < 70

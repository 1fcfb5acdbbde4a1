"""The table of rights: every method of the contract has a row, a method without one is not served, and rows mean what they say."""

from types import SimpleNamespace
from typing import Any

import pytest

from broker.calls import unary_handlers
from broker.errors import NotAllowed
from broker.proto import cxlmq_pb2 as pb
from broker.rights import METHODS, Rule
from broker.security import RIGHTS, Guard, Principal

TOPIC, OTHER = "frames.front", "orders"


def request_of(method: str) -> Any:
    """What a method is asked, about TOPIC where it names one."""
    service, name = method.split("/")
    described = pb.DESCRIPTOR.services_by_name[service].methods_by_name[name].input_type
    request = pb.PublishOpen() if method == "PubSub/Publish" else getattr(pb, described.name)()
    if METHODS[method].topic:
        *parents, field = METHODS[method].topic.split(".")
        inner = request
        for parent in parents:
            inner = getattr(inner, parent)
        setattr(inner, field, TOPIC)
    return request


def test_every_method_of_the_contract_has_a_row() -> None:
    contract = {f"{service}/{method.name}" for service, each in pb.DESCRIPTOR.services_by_name.items()
                for method in each.methods}
    assert METHODS.keys() == contract


def test_a_method_without_a_row_is_not_served() -> None:
    async def anything(request: Any, context: Any) -> pb.Topic:
        return pb.Topic()

    with pytest.raises(KeyError, match="Admin/Everything"):
        unary_handlers(Guard(None), "Admin", {"Everything": (anything, pb.ListTopicsRequest, pb.Topic)})


@pytest.mark.parametrize("right", RIGHTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_row_asks_for_its_rights_to_the_topic_that_is_named(method: str, right: str) -> None:
    access, request = METHODS[method], request_of(method)
    refuses = access.rule is Rule.TOPIC or (access.rule is Rule.SEEN and bool(access.topic))
    for topics, covered in (((TOPIC,), True), (("frames.*",), True), ((OTHER,), False), ((), False)):
        caller = Principal("somebody", **{right: topics})
        if refuses and not (covered and right in access.rights):
            with pytest.raises(NotAllowed) as raised:
                access.check(caller, request)
            assert (raised.value.principal, raised.value.topic) == ("somebody", TOPIC)
        else:
            access.check(caller, request)


@pytest.mark.parametrize("right", RIGHTS)
def test_answers_show_what_the_caller_may_see(right: str) -> None:
    topics = [SimpleNamespace(name=name) for name in (TOPIC, OTHER)]
    for method in ("Admin/ListTopics", "Groups/List"):
        assert METHODS[method].seen(Principal("somebody", **{right: ("frames.*",)}), topics) == topics[:1]
        assert METHODS[method].seen(Principal("nobody"), topics) == []


def test_a_principal_has_the_same_number_after_every_restart() -> None:
    assert Principal("camera").number == Principal("camera", publish=("*",)).number == 0x9427928D51B9E889
    assert Principal("camera").number != Principal("viewer").number

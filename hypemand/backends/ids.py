"""Ids of instances on their way into a path or a request."""

from hypemand.backends.base import InstanceNotFound
from hypemand.core.errors import RuleBroken
from hypemand.core.model import InstanceId
from hypemand.core.naming import check_instance_id


def checked(instance: InstanceId) -> InstanceId:
    """*instance*, if it can be the id of anything.

    Raises:
        InstanceNotFound: It can't.
    """
    try:
        return check_instance_id(instance)
    except RuleBroken as error:
        raise InstanceNotFound(f"no instance can have this id: {error}") from error

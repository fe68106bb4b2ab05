"""The config keys of a libvirt backend."""

from urllib.parse import SplitResult, urlsplit

from attrs import field, frozen

from hypemand.core.errors import RuleBroken, RulesBroken

_TRANSPORTS_HERE = frozenset({"", "unix"})


@frozen(kw_only=True)
class LibvirtSettings:
    """Keys of a backend of this type.

    Attributes:
        uri: As ``virsh --connect`` takes it, of a QEMU driver.
    """

    uri: str = field(default="qemu:///system")

    def __attrs_post_init__(self) -> None:
        """Check what a type alone does not say."""
        try:
            driver = self._parts.scheme.partition("+")[0]
        except ValueError as error:
            raise RulesBroken([RuleBroken(f"{self.uri!r} is not a URI: {error}", "uri")]) from error
        if driver != "qemu":
            rule = f'{self.uri!r} must be the URI of a QEMU driver, like "qemu:///system" or "qemu+ssh://host/system"'
            raise RulesBroken([RuleBroken(rule, "uri")])

    @property
    def _parts(self) -> SplitResult:
        return urlsplit(self.uri)

    @property
    def is_here(self) -> bool:
        """Whether its guests are on this machine, so that their files can be seen from here."""
        transport = self._parts.scheme.partition("+")[2]
        return transport in _TRANSPORTS_HERE and not self._parts.netloc

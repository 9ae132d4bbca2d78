"""The exceptions of vmcore: one tree below Error, whose classes are also the builtin ones that fit."""

from __future__ import annotations

import builtins
import errno as _errno
import os
from typing import Any


class Error(Exception):
    """What went wrong in vmcore. The text names operation and value; what to do is a note, and `fix`."""

    #: Which error it is, for programs: "config", "memory.overlap", ...
    code: str = "error"
    #: What to do about it, where that is known.
    fix: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._origin, self.args, self.__dict__)

    @property
    def _origin(self) -> str:
        """The name of the class of this module that it is, or that it was specialised from."""
        return next(str(c.__name__) for c in type(self).__mro__ if globals().get(c.__name__) is c)


class _Os(OSError):
    """Stands before the classes that are no OSError, or theirs would be how an exception is made."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Error.__reduce__(self)  # type: ignore[arg-type]


class GuestMemoryError(Error, ValueError):
    """Guest memory: layout, mapping, access."""


class NotMappedError(GuestMemoryError, IndexError):
    """No memory is at the address."""


class HostMemoryError(_Os, GuestMemoryError):
    """The host refused a mapping."""


class BootError(Error, ValueError):
    """The kernel or image to boot."""


class BootFileError(_Os, BootError):
    """The kernel or image cannot be read."""


class SystemCallError(_Os, Error):
    """A system call or KVM ioctl failed."""


class BackendUnusableError(Error, RuntimeError):
    """The backend asked for cannot be used on this host."""

    backend: str


class UnsupportedError(Error, NotImplementedError):
    """The backend does not offer something."""

    backend: str


class ConfigError(Error, ValueError):
    """A setting that makes no sense, alone or with others."""


class ConflictError(Error, ValueError):
    """Two devices want the same addresses, ports or interrupt."""


class EmulationError(Error, RuntimeError):
    """The backend could not execute an instruction of the guest."""

    rip: int
    bytes: builtins.bytes
    instruction: str


class EntryFailedError(Error, RuntimeError):
    """The processor refused to enter the guest."""

    reason: int


class StateError(Error, ValueError):
    """A saved state does not fit what it is restored into."""


class WrongStateError(Error, RuntimeError):
    """The call does not fit what the VM is doing."""


class ClosedError(WrongStateError, ValueError):
    """The VM is closed, as a file may be."""


class DeviceError(Error, RuntimeError):
    """A device failed to attach, activate, save or restore."""

    device: str


class DeviceHostError(_Os, DeviceError):
    """The host refused what a device needs."""


class DiskError(DeviceError, ValueError):
    """A disk image that cannot be used."""


class DiskFileError(_Os, DiskError):
    """A disk image that cannot be opened."""


class NatError(DeviceError, ValueError):
    """A setting of the NAT that cannot be."""


class NatHostError(_Os, NatError):
    """The host refused what the NAT needs."""


class WaitTimeoutError(Error, TimeoutError):
    """The time that a call was given is over."""


class ExpectTimeoutError(WaitTimeoutError):
    """The guest did not say what was expected."""


class ConsoleClosedError(Error, EOFError):
    """The guest has ended, or its VM is closed, and will say no more."""


_specialised: dict[tuple[type[Error], type[OSError]], type[Error]] = {}


def _class_for(name: str, errno: int | None) -> type[Error]:
    cls: type[Error] = globals()[name]
    if errno is None or not issubclass(cls, OSError):
        return cls
    # OSError(ENOENT, ...) is a FileNotFoundError, and so on; that of a subclass is not unless it is made so.
    builtin = type(OSError(errno, ""))
    if issubclass(cls, builtin):
        return cls
    key = (cls, builtin)
    if key not in _specialised:
        bases: tuple[type, ...] = (builtin, cls)
        _specialised[key] = type(name, bases, {"__module__": __name__, "__doc__": cls.__doc__})  # pyright: ignore[reportGeneralTypeIssues]
    return _specialised[key]


def _make(  # pyright: ignore[reportUnusedFunction]
    name: str, message: str, code: str, fix: str | None, errno: int | None, attributes: dict[str, Any]
) -> Error:
    """The exception of class `name`; what the engine calls."""
    cls = _class_for(name, errno)
    if issubclass(cls, OSError) and errno is not None:
        text = os.strerror(errno)
        # Before the text of the error itself comes its name, which Python puts there.
        error: Error = cls(errno, message.replace(f"{text} (os error {errno})", text))
    else:
        error = cls(message)
    error.code = code
    error.fix = fix
    for key, value in attributes.items():
        setattr(error, key, value)
    if fix:
        error.add_note(f"fix: {fix}")
    return error


def _rebuild(name: str, args: tuple[Any, ...], state: dict[str, Any]) -> Error:
    """An exception from its pickle."""
    errno = args[0] if args and isinstance(args[0], int) and args[0] in _errno.errorcode else None
    error = _class_for(name, errno)(*args)
    error.__dict__.update(state)
    return error

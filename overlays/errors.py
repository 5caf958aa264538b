"""What can go wrong, as one tree.

OverlayError
├── SourceError      a vLLM could not be found, listed or read
├── ShapeUnknown     a patch does not know this code: fail closed
├── NotHere          what a patch is about does not exist in this build
├── PatchDeclined    the patch set itself is wrong: two of a name, a cycle
├── RequiredFailed   a required patch failed, so there is no bundle
└── BundleBroken     a bundle is incomplete or was altered
"""

from __future__ import annotations


class OverlayError(Exception):
    """The root. Its text is what a user reads: one line that says what to do."""


class SourceError(OverlayError):
    """The vLLM to be patched could not be found, listed or read."""


class ShapeUnknown(OverlayError):
    """The code is not shaped as the patch knows it."""


class NotHere(OverlayError):
    """The code that the patch is about does not exist in this build."""


class PatchDeclined(OverlayError):
    """The set of patches is wrong in itself."""


class RequiredFailed(OverlayError):
    """A required patch failed; nothing was built."""


class BundleBroken(OverlayError):
    """A bundle lacks a file, has one too many, or one with other bytes than its manifest says."""


# What requests and urllib3 wrap into each other is a paragraph: what it comes to, where an operator can act on it.
_COMES_TO = (
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is of no authority that is known here"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS: give its address with http://"),
    ("Connection refused", "nobody listens there"),
    ("Failed to resolve", "there is no host of that name"),
    ("timed out", "it does not answer in time"),
    ("Invalid URL", "that is no address: give it with http:// or https://"),
)


def reason(error: Exception) -> str:
    """Why something could not be asked, in one line."""
    text = " ".join(str(error).split())
    return next((words for mark, words in _COMES_TO if mark in text), text)

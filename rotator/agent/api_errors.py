"""Errors as the agent tells them: {"error": words}."""

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from rotator.ports import DeviceError, DeviceTimeout, LaunchError


def error(status: int, words: str) -> JSONResponse:
    return JSONResponse({"error": words}, status)


def tell_errors(api: FastAPI) -> None:
    """What the adapters raise, as answers."""
    api.add_exception_handler(DeviceTimeout, lambda _, e: error(504, str(e)))
    api.add_exception_handler(DeviceError, lambda _, e: error(502, str(e)))
    api.add_exception_handler(LaunchError, lambda _, e: error(504, str(e)))

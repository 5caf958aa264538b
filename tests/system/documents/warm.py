"""`python -m tests.system.documents.warm SOCKET`: the `rotator` of the documents, without its start each time.

Whoever connects sends arguments, folder, environment and its three streams; a fork of this process, which has imported
everything, runs the real command with them. So a hundred commands cost what two would.
"""

import array
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

# What stands on PATH as `rotator`: no imports of ours, so it is there at once. It hands signals on.
CLIENT = """#!{python} -SIE
import array, json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as s:
    s.connect({socket!r})
    said = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
    fds = array.array("i", [0, 1, 2])
    s.sendmsg([len(said).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    s.sendall(said)
    pid = int.from_bytes(s.recv(4), "big")
    for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(n, lambda number, frame: os.kill(pid, number))
    code = s.recv(1)
sys.exit(code[0] if code else 137)
"""


def main(path: str) -> None:
    import rotator.app
    import rotator.check
    import rotator.cli.main
    import rotator.cli.surroundings
    import rotator.doctor.walk
    import rotator.service.api  # noqa: F401 # imported here once, for every fork

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks: they tell their callers themselves
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        Path(path + ".ready").touch()
        while True:
            caller, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _serve(caller)
            caller.close()


def _serve(caller: socket.socket) -> None:
    code = 70
    try:
        code = _run(caller)
    except BaseException:  # the fork must end here, whatever happens
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        caller.send(bytes([code & 0xFF]))
        os._exit(code & 0xFF)


def _run(caller: socket.socket) -> int:
    fds = array.array("i")
    size, control, _, _ = caller.recvmsg(4, socket.CMSG_SPACE(3 * fds.itemsize))
    fds.frombytes(control[0][2])
    said = b""
    while len(said) < int.from_bytes(size, "big"):
        said += caller.recv(1 << 16)
    argv, folder, environment = json.loads(said)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    caller.send(os.getpid().to_bytes(4, "big"))
    from rotator.cli.main import run

    sys.argv = argv
    return run(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1])

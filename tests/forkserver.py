"""Starts programs by forking a process that has imported torch already, since that import takes a rank several seconds.

usage: forkserver.py SOCKET, which ends when its standard input does. A client connects to the socket once for each process and
sends a line of JSON: argv, env, cwd, and the files out and err. It gets a line with the process's id and, later, one with its
exit code, which is negative for a signal.
"""

import atexit
import gc
import json
import os
import runpy
import shutil
import signal
import socket
import sys
import threading
import traceback
from typing import Any

ENVIRONMENT = {"OMP_NUM_THREADS": "1"}  # of the server: no thread may run when it forks


def prepare(request: dict[str, Any]) -> None:
    """Make this process look like one that was just started."""
    os.setsid()
    for number, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    program, *arguments = request["argv"]
    sys.argv = [program, *arguments]
    sys.path[0] = request["cwd"] if program == "-m" else os.path.dirname(os.path.abspath(program))


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Start a process and wait for it; returns the request in that process, and None in this one."""
    with connection, connection.makefile("rw") as stream:
        request: dict[str, Any] = json.loads(stream.readline())
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        process = os.fork()
        if not process:
            return request
        print(process, file=stream, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), file=stream, flush=True)
    return None


def wait_for_request(path: str) -> dict[str, Any]:
    """Accept connections for ever; returns in the processes that are started, with what they are to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the processes that wait for others
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen(64)
        os.rename(f"{path}.new", path)  # a client may connect as soon as it sees this name
        while True:
            connection, _ = listener.accept()
            if os.fork():
                connection.close()
                continue
            listener.close()
            request = serve(connection)
            if request is None:
                os._exit(0)
            return request


def main(path: str) -> None:

    import distrib.inference.evaluate
    import distrib.run  # noqa: F401

    assert threading.active_count() == 1, threading.enumerate()
    server = os.getpid()
    if os.fork() == 0:  # the server's end, when the tests have ended
        sys.stdin.read()
        os.kill(server, signal.SIGKILL)
        shutil.rmtree(os.path.dirname(path))
        os._exit(0)
    gc.freeze()  # otherwise a collection in each process would copy all of this memory
    request = wait_for_request(path)
    prepare(request)
    code = run_program()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # Python would take two seconds to free what the server has imported


def run_program() -> int:
    """Run the program that sys.argv names; returns its exit code."""
    try:
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.last_value = error
        traceback.print_exception(error)
        return 1
    return 0


if __name__ == "__main__":
    main(sys.argv[1])

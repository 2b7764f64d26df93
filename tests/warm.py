"""Kernels in which PyTorch, timm, Matplotlib and scikit-learn are imported. Nearly all lessons need them, and to import
them takes longer than most lessons, so one Python does it, and each kernel is a process of its own, forked from that.
`python warm.py PLACE` is that Python; `python warm.py PLACE ARGUMENTS` asks it for a kernel, and lives as long."""
import atexit
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager

SUPPORTED = hasattr(os, "pidfd_open")  # Linux
PRELOAD = "torch", "timm", "matplotlib.pyplot", "sklearn.datasets", "ipykernel.kernelapp"


@contextmanager
def warm_python():
    "Gives the beginning of a command line that starts a kernel, as `python -m ipykernel_launcher` does."
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, f"{folder}/door"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            if server.stdout.readline() != "ready\n":
                raise RuntimeError("warm.py has not started; what it says stands above.")
            yield command
            server.stdin.close()  # which ends it


def ask(place, arguments):
    "Have a kernel started, and wait for its end."
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which Jupyter sends before it asks a kernel to end
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(place)
        order = dict(arguments=arguments, folder=os.getcwd(), environment=dict(os.environ))
        server.sendall(json.dumps(order).encode() + b"\n")
        server.recv(1)  # nothing is sent: the server closes the connection


def serve(place):
    "Fork a kernel for each that asks, and kill it once that has gone. Returns twice: None, and in a kernel its order."
    with socket.socket(socket.AF_UNIX) as door, selectors.DefaultSelector() as events:
        door.bind(place)
        door.listen()
        for source in (door, sys.stdin):  # which is closed when the tests are done, or dead
            events.register(source, selectors.EVENT_READ)
        kernels = {}  # by either thing that tells of the end: (process, connection, descriptor of the process)
        print("ready", flush=True)
        while True:
            for source in [key.fileobj for key, _ in events.select()]:
                if source is sys.stdin:
                    for process in {process for process, *_ in kernels.values()}:
                        os.kill(process, signal.SIGKILL)
                    return None
                if source is door:
                    connection, _ = door.accept()
                    with connection.makefile() as text:
                        order = json.loads(text.readline())
                    process = os.fork()
                    if process == 0:
                        connection.close()
                        return order
                    end = os.pidfd_open(process)
                    for source in (connection, end):
                        events.register(source, selectors.EVENT_READ)
                        kernels[source] = process, connection, end
                elif source in kernels:  # the other of the two may have been first
                    process, connection, end = kernels[source]
                    if source is connection:
                        os.kill(process, signal.SIGKILL)
                    os.waitpid(process, 0)
                    for source in (connection, end):
                        events.unregister(source)
                        del kernels[source]
                    connection.close()
                    os.close(end)


def be_a_kernel(order):
    "From here to the end; but what only frees memory, which takes seconds, is left to the system."
    os.setsid()
    for stream in (0, 1):  # which are the line between the tests and this Python
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    os.environ.pop("JPY_PARENT_PID", None)  # whose child this process is not
    tempfile.tempdir = None  # as the environment says
    sys.argv = ["ipykernel_launcher", *order["arguments"]]
    sys.path.pop(0)  # where this file lies
    try:
        sys.modules["ipykernel.kernelapp"].launch_new_instance()
    finally:
        atexit._run_exitfuncs()
        os._exit(0)


if __name__ == "__main__":
    place, *arguments = sys.argv[1:]
    if arguments:
        ask(place, arguments)
    else:
        os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as in a kernel
        for name in PRELOAD:
            importlib.import_module(name)
        gc.freeze()
        if order := serve(place):
            be_a_kernel(order)

"""Jupyter kernels that start with the packages that every notebook imports; these take longer than most of what is
tested. `python warm_kernel.py SOCKET` imports them once, nothing of this project among them, and forks a kernel per
request. `python warm_kernel.py SOCKET CONNECTION_FILE`, a kernel specification's command, is such a request, and lives
as long as its kernel."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading

PACKAGES = "datasets lm_eval.models.huggingface lm_eval.tasks lm_eval.utils matplotlib.figure pandas scipy.stats torch \
transformers.models.llama.modeling_llama transformers.models.mistral.modeling_mistral ipykernel.kernelapp".split()


def serve(address: str) -> None:
    for package in PACKAGES:
        __import__(package)
    del sys.path[0]  # this folder, which no kernel would see
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the kernels
            request, _ = server.accept()
            if not os.fork():
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                kernel(request)
            request.close()


def kernel(request: socket.socket) -> None:
    """In the fork: what the requesting process would have become, had it imported everything itself."""
    asked = json.loads(request.makefile().readline())
    os.setsid()
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
    os.environ.pop("JPY_PARENT_PID", None)  # of the process that asked: the thread below ends with it
    sys.argv = ["ipykernel_launcher", "-f", asked["connection"]]
    threading.Thread(target=lambda: request.recv(1) or os._exit(1), daemon=True).start()
    from ipykernel import kernelapp

    kernelapp.launch_new_instance()
    sys.exit()


def ask(address: str, connection: str) -> None:
    asked = {"folder": os.getcwd(), "connection": connection, "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as request:
        request.connect(address)
        request.sendall((json.dumps(asked) + "\n").encode())
        request.recv(1)  # returns when the kernel is gone


if __name__ == "__main__":
    (ask if sys.argv[2:] else serve)(*sys.argv[1:])

#!/usr/bin/env python3
"""A worker for Singletrack: claims runs of workflows with the executor `pull`, and executes them one at a time.

    worker.py [--url URL] [--workflow ID]... [--queue NAME]... [COMMAND [ARGUMENT]...]

COMMAND gets a run's input as JSON on standard input. What it prints is the run's log, a JSON object on its last line the
output; exit code 0 succeeds. Without a COMMAND the function `handle` below runs: put your own work there.

TERM and Ctrl-C stop the work, give the run back and end the worker; a second one ends it at once. Start as many workers as
you like. Needs Python 3.8 and nothing else.

A worker that is killed (KILL) leaves its command behind, which may go on beside the next attempt: let what it writes to
refuse a smaller SINGLETRACK_FENCE than it has seen.
"""

import argparse
import codecs
import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid

GRACE = 3  # seconds between TERM and KILL
PIECE = 16384  # bytes of log in a request: at most 64 KiB once decoded


def handle(run, lease):
    """The work. Returns the output, a dict or None; what it raises makes the run fail. Heeds lease.stopped()."""
    lease.log("stdout", f"{run['workflow_id']}, attempt {run['attempt']}, fence {run['fence']}\n")
    return {"echo": run["input"]}


class Refused(Exception):
    """The server has understood the request and won't carry it out: repeating it is no use."""


class Server:
    def __init__(self, url):
        self.base = url.rstrip("/") + "/api/v1/"

    def post(self, path, body, timeout):
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.base + path, data, headers), timeout=timeout) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise Refused(f"{path}: {error.read().decode(errors='replace')}") from None
            raise

    def insist(self, path, body, give_up=lambda: False):
        """Posts until there is an answer. Every request of a worker may be repeated as it is: it takes effect once."""
        while True:
            try:
                return self.post(path, body, timeout=30)
            except (OSError, http.client.HTTPException) as error:
                say(f"{path}: {error}; trying again")
            if give_up():
                return None
            time.sleep(1)


class Lease:
    """The right to work on one run, kept by heartbeats."""

    def __init__(self, server, terms):
        self.server, self.token = server, terms["token"]
        self.interval, self.timeout = terms["heartbeat_interval_seconds"], terms["heartbeat_timeout_seconds"]
        self.good = now()  # when the last heartbeat that was answered was sent
        self.why = None
        self.over = threading.Event()
        self.seq = itertools.count(1)

    def stopped(self):
        """Why the work has to end: `requested`, `timeout`, `lost` or `shutdown`; None while it may go on."""
        return self.why or ("shutdown" if stopping else None)

    def beat(self):
        """Sends a heartbeat. Whether it was answered."""
        sent = now()
        try:
            body = {"leases": [{"token": self.token}]}
            answer = self.server.post("leases/heartbeat", body, timeout=self.timeout / 12)["leases"][0]
        except (OSError, http.client.HTTPException) as error:
            say(f"heartbeat: {error}")
            answer = {"result": "busy"}
        except Refused as error:
            say(error)
            answer = {"result": "lost"}
        if answer["result"] in ("ok", "cancel_requested"):
            self.good = sent
        if answer["result"] == "cancel_requested":
            self.why = answer["reason"]
        # The work must be over when the timeout is: somebody else may begin then.
        if answer["result"] == "lost" or now() - self.good > self.timeout * 2 / 3:
            self.why = "lost"
        return answer["result"] != "busy"

    def confirm(self):
        """The first heartbeat, before any work. Whether the work may begin."""
        while not self.beat() and not self.stopped():
            time.sleep(self.timeout / 12)
        return not self.stopped()

    def keep(self):
        pause = self.interval
        while not self.over.wait(pause) and self.why != "lost":
            pause = self.interval if self.beat() else self.timeout / 12

    def log(self, stream, text):
        piece = {"token": self.token, "stream": stream, "seq": next(self.seq), "text": text.replace("\0", "\ufffd")}
        with contextlib.suppress(Refused):  # the lease is lost: the next heartbeat says so
            self.server.insist("leases/logs", piece, give_up=lambda: self.why == "lost")

    def finish(self, **end):
        try:
            answer = self.server.insist("leases/finish", {"leases": [{"token": self.token, **end}]})
        except Refused as error:
            say(error)  # the output perhaps, which is too long: better a failure than a run that goes stale
            answer = self.server.insist("leases/finish", {"leases": [{"token": self.token, "outcome": "failed",
                                                                      "error": one_line(error)}]})
        return answer["leases"][0]

    def release(self):
        self.server.insist("leases/release", {"leases": [{"token": self.token}]})


def attempt(server, run, work):
    lease = Lease(server, run["lease"])
    if not lease.confirm():
        return lease.release()
    keeper = threading.Thread(target=lease.keep, daemon=True)
    keeper.start()
    say(f"run {run['id']} of {run['workflow_id']} begins")
    try:
        end = {"outcome": "succeeded", "output": work(run, lease)}
    except Exception as error:
        end = {"outcome": "cancelled" if lease.stopped() else "failed", "error": one_line(error)}
    # Heartbeats go on until the run is over: its end may have to be sent more than once.
    if end["outcome"] == "cancelled" and lease.stopped() == "shutdown":
        lease.release()
        say(f"run {run['id']} is given back")
    elif lease.why != "lost":
        finished = lease.finish(**end)
        say(f"run {run['id']} is {finished['run']['status']}" + (", by others" if finished["result"] == "lost" else ""))
    lease.over.set()
    keeper.join()


def command(argv):
    """The work of running a command: what `handle` is to a function."""

    def work(run, lease):
        names = {"RUN_ID": run["id"], "WORKFLOW_ID": run["workflow_id"], "ATTEMPT": run["attempt"], "FENCE": run["fence"]}
        env = {**os.environ, **{f"SINGLETRACK_{name}": str(value) for name, value in names.items()}}
        with tempfile.TemporaryFile() as given:
            given.write(json.dumps(run["input"]).encode())
            given.seek(0)
            pipes = {"stdin": given, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = subprocess.Popen(argv, env=env, start_new_session=True, **pipes)
        tails = {}
        readers = [threading.Thread(target=read, args=(name, getattr(process, name), lease, tails), daemon=True)
                   for name in ("stdout", "stderr")]
        for reader in readers:
            reader.start()
        while process.poll() is None and not lease.stopped():
            time.sleep(0.05)
        if process.poll() is None:
            kill(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        kill(process, signal.SIGKILL)  # and what it has left behind
        code = process.wait()
        for reader in readers:
            reader.join()
        if code != 0:
            raise Exception(f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}")
        with contextlib.suppress(ValueError):
            output = json.loads(tails["stdout"].rstrip("\n").rpartition("\n")[2])
            return output if isinstance(output, dict) else None

    return work


def read(name, pipe, lease, tails):
    """Makes what comes out of a pipe the run's log, and keeps the end of it."""
    decoder, tails[name] = codecs.getincrementaldecoder("utf-8")("replace"), ""
    while data := pipe.read1(PIECE):
        text = decoder.decode(data)
        tails[name] = (tails[name] + text)[-(1 << 18):]
        lease.log(name, text)
        if len(data) < PIECE:
            time.sleep(0.1)  # lets more of it gather, for each piece is a request


def kill(process, how):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def now():
    """A clock that goes on while the machine is suspended, as the lease does."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def one_line(error):
    return " ".join(str(error).split())[:1000] or type(error).__name__


def say(text):
    print(text, file=sys.stderr, flush=True)


stopping = False


def stop(number, _):
    global stopping
    stopping = True
    signal.signal(number, signal.SIG_DFL)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--url", default=os.environ.get("SINGLETRACK_URL", "http://127.0.0.1:7410"))
    options.add_argument("--workflow", action="append", metavar="ID")
    options.add_argument("--queue", action="append", metavar="NAME")
    options.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    given = options.parse_args()
    if given.command[:1] == ["--"]:  # an argparse that keeps it would take it for the program
        del given.command[0]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server, work = Server(given.url), command(given.command) if given.command else handle
    wanted = {"worker": f"{socket.gethostname()}:{os.getpid()}", "wait_seconds": 10}
    wanted.update({name: value for name, value in (("workflows", given.workflow), ("queues", given.queue)) if value})
    while not stopping:
        # A fresh id for each claim: when its answer is lost, the repetition gets what the first one took.
        claimed = server.insist("claims", {**wanted, "claim_id": str(uuid.uuid4())}, give_up=lambda: stopping)
        for run in claimed["runs"] if claimed else []:
            attempt(server, run, work)
        if claimed and not claimed["runs"]:
            time.sleep(0.5)  # a replica that is stopping does not keep anybody waiting


if __name__ == "__main__":
    main()

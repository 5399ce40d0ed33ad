"""E2B's published Python client, unmodified, against the guest agent alone.

With E2B_DEBUG=true the client speaks to http://localhost:49983 and to nothing else, which is
where crates/envd/tests/clients.rs starts one (`envd --no-vm --port 49983`). It also runs
against a real sandbox, with the variables that test_e2b.py reads.

Prints "ok NAME" for each part and "N of N passed"; exits with 1 after the first failure.
"""

import os
import sys
import time
import traceback
import warnings

from e2b import (
    CommandExitException,
    FileNotFoundException,
    FilesystemEventType,
    InvalidArgumentException,
    PtySize,
    Sandbox,
    TimeoutException,
)

# Their git helpers announce their own end.
warnings.simplefilter("ignore", DeprecationWarning)

FOLDER = f"/tmp/e2b-python-{os.getpid()}"
PARTS = []


def part(function):
    PARTS.append(function)
    return function


def expect(exception, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except exception as error:
        return error
    raise AssertionError(f"no {exception.__name__}")


@part
def command_output_and_exit(sandbox):
    arrived = []
    result = sandbox.commands.run(
        "for i in 1 2 3; do echo line $i; sleep 0.3; done; echo problem >&2",
        on_stdout=lambda text: arrived.append((time.monotonic(), text)),
    )
    assert (result.exit_code, result.stdout, result.stderr) == (0, "line 1\nline 2\nline 3\n", "problem\n"), result
    assert arrived[-1][0] - arrived[0][0] > 0.3, arrived
    error = expect(CommandExitException, sandbox.commands.run, "echo before; exit 3")
    assert (error.exit_code, error.stdout) == (3, "before\n"), error
    assert sandbox.commands.run("echo $A; pwd", envs={"A": "1"}, cwd="/usr").stdout == "1\n/usr\n"
    expect(InvalidArgumentException, sandbox.commands.run, "pwd", cwd="/no/such")
    expect(TimeoutException, sandbox.commands.run, "sleep 16180", timeout=1.5)
    assert sandbox.commands.run("pgrep -f '[s]leep 16180' || echo none").stdout == "none\n"


@part
def standard_input_by_messages_and_by_a_stream(sandbox):
    handle = sandbox.commands.run("cat", background=True, stdin=True)
    sandbox.commands.send_stdin(handle.pid, "hello ")
    sandbox.commands.stream_input(handle.pid, iter(["there", b" \xe2\x98\x83\n"]))
    sandbox.commands.close_stdin(handle.pid)
    assert handle.wait().stdout == "hello there ☃\n"

    handle = sandbox.commands.run("wc -c", background=True, stdin=True)
    sandbox.commands.stream_input(handle.pid, (b"x" * 100_000 for _ in range(30)))
    sandbox.commands.close_stdin(handle.pid)
    assert handle.wait().stdout == "3000000\n"


@part
def programs_are_listed_found_and_killed(sandbox):
    handle = sandbox.commands.run("sleep 1000", background=True)
    assert any(process.pid == handle.pid for process in sandbox.commands.list())
    handle.disconnect()
    again = sandbox.commands.connect(handle.pid)
    assert sandbox.commands.kill(handle.pid) is True
    expect(CommandExitException, again.wait)
    assert sandbox.commands.kill(handle.pid) is False


@part
def a_terminal(sandbox):
    terminal = sandbox.pty.create(PtySize(cols=91, rows=33), cwd="/usr", timeout=60)
    sandbox.pty.send_stdin(terminal.pid, b"stty size; pwd\n")
    sandbox.pty.resize(terminal.pid, PtySize(cols=120, rows=40))
    sandbox.pty.stream_input(terminal.pid, iter([b"stty si", b"ze\n", b"exit 7\n"]))
    seen = []
    error = expect(CommandExitException, terminal.wait, on_pty=seen.append)
    assert error.exit_code == 7, error
    text = b"".join(seen).decode()
    assert "40 120" in text and "/usr" in text, text


@part
def files_are_written_and_read(sandbox):
    files = sandbox.files
    text = "first line\nzweite Zeile: äöü ☃\n"
    info = files.write(f"{FOLDER}/notes/today.txt", text)
    assert info.path == f"{FOLDER}/notes/today.txt", info
    assert files.read(info.path) == text
    data = bytes(i * 31 % 251 for i in range(2_000_000))
    for options in ({}, {"gzip": True}, {"use_octet_stream": True}, {"use_octet_stream": False}):
        files.write(f"{FOLDER}/data", data, **options)
        assert bytes(files.read(f"{FOLDER}/data", format="bytes")) == data, options
    assert bytes(files.read(f"{FOLDER}/data", format="bytes", gzip=True)) == data
    assert b"".join(files.read(f"{FOLDER}/data", format="stream")) == data
    files.write(f"{FOLDER}/parts", iter([b"by ", b"parts"]))
    assert files.read(f"{FOLDER}/parts") == "by parts"
    files.write_files([{"path": f"{FOLDER}/one", "data": "1"}, {"path": f"{FOLDER}/two", "data": "2"}])
    assert files.read(f"{FOLDER}/one") + files.read(f"{FOLDER}/two") == "12"
    # At home, on the disk: the guest's /tmp is in memory, where kernels before 6.6 keep none.
    path = files.write("e2b-python-labelled", "x", metadata={"origin": "a test"}).path
    assert files.get_info(path).metadata == {"origin": "a test"}
    files.remove(path)


@part
def folders_are_listed_and_changed(sandbox):
    files = sandbox.files
    assert files.make_dir(f"{FOLDER}/dir/sub") is True
    assert files.make_dir(f"{FOLDER}/dir/sub") is False
    files.write(f"{FOLDER}/dir/file", "x" * 10)
    entries = files.list(f"{FOLDER}/dir")
    assert [(entry.name, entry.type.value) for entry in entries] == [("file", "file"), ("sub", "dir")], entries
    assert entries[0].permissions == "-rw-r--r--" and entries[0].size == 10, entries
    files.rename(f"{FOLDER}/dir/file", f"{FOLDER}/dir/sub/renamed")
    assert len(files.list(f"{FOLDER}/dir", depth=2)) == 2
    files.remove(f"{FOLDER}/dir")
    assert not files.exists(f"{FOLDER}/dir")
    expect(FileNotFoundException, files.read, f"{FOLDER}/dir/file")
    expect(InvalidArgumentException, files.read, FOLDER)


@part
def a_folder_is_watched(sandbox):
    files = sandbox.files
    files.make_dir(f"{FOLDER}/watched")
    watch = files.watch_dir(f"{FOLDER}/watched", recursive=True, include_entry=True)
    files.write(f"{FOLDER}/watched/new", "text")
    events = []
    deadline = time.monotonic() + 10
    while len(events) < 3 and time.monotonic() < deadline:
        events += watch.get_new_events()
    kinds = FilesystemEventType
    assert [(e.name, e.type) for e in events] == [
        ("new", kinds.CREATE),
        ("new", kinds.CHMOD),
        ("new", kinds.WRITE),
    ], events
    assert events[2].entry.size == 4, events
    watch.stop()


@part
def git(sandbox):
    git, files, repository = sandbox.git, sandbox.files, f"{FOLDER}/repository"
    git.init(repository, initial_branch="main")
    files.write(f"{repository}/a.txt", "one\n")
    status = git.status(repository)
    assert (status.current_branch, status.has_untracked) == ("main", True), status
    git.add(repository)
    assert git.status(repository).has_staged
    git.commit(repository, "first", author_name="A", author_email="a@example.org")
    assert git.status(repository).is_clean
    git.create_branch(repository, "side")
    assert sorted(git.branches(repository).branches) == ["main", "side"]
    git.clone(f"file://{repository}", path=f"{FOLDER}/clone", depth=1)
    assert files.read(f"{FOLDER}/clone/a.txt") == "one\n"
    git.remote_add(repository, "other", "https://example.org/x.git")
    assert git.remote_get(repository, "other") == "https://example.org/x.git"


def main():
    sandbox = Sandbox.create(timeout=300)
    passed = 0
    try:
        for function in PARTS:
            start = time.monotonic()
            function(sandbox)
            passed += 1
            print(f"ok {function.__name__} ({time.monotonic() - start:.2f} s)")
    except Exception:
        traceback.print_exc()
        print(f"FAILED {PARTS[passed].__name__}")
    sandbox.commands.run(f"rm -rf {FOLDER}")
    sandbox.kill()
    print(f"{passed} of {len(PARTS)} passed")
    sys.exit(0 if passed == len(PARTS) else 1)


if __name__ == "__main__":
    main()

"""E2B's published Python client, unmodified, against the server at E2B_API_URL.

Run by crates/e2e (`e2b::the_published_python_client_works`), or by hand:

    E2B_API_URL=http://127.0.0.1:3000 E2B_SANDBOX_URL=http://127.0.0.1:3000 \\
    E2B_API_KEY=e2b_... target/python/bin/python tests/python/test_e2b.py

Prints "ok NAME" for each part and "N of N passed" at the end; exits with 1 at the first
assertion that fails.
"""

import os
import sys
import time
import traceback
import urllib.error
import urllib.request

from e2b import (
    AuthenticationException,
    CommandExitException,
    NotFoundException,
    Sandbox,
    SandboxException,
    TimeoutException,
)

PARTS = []


def part(function):
    PARTS.append(function)
    return function


@part
def command_with_streamed_output(sandbox):
    arrived = []
    result = sandbox.commands.run(
        "for i in 1 2 3; do echo line $i; sleep 0.5; done; echo problem >&2",
        on_stdout=lambda text: arrived.append((time.monotonic(), text)),
    )
    assert result.exit_code == 0, result
    assert result.stdout == "line 1\nline 2\nline 3\n", result
    assert result.stderr == "problem\n", result
    assert "".join(text for _, text in arrived) == result.stdout, arrived
    # Streamed, not handed over at the end: the first line came well before the last.
    assert arrived[-1][0] - arrived[0][0] > 0.5, arrived


@part
def python_in_a_kernel_of_its_own(sandbox):
    program = "import platform; print(platform.system(), platform.release())"
    result = sandbox.commands.run(f'python3 -c "{program}"')
    assert result.stdout.startswith("Linux ") and "cloud" in result.stdout, result
    assert sandbox.commands.run("whoami; pwd").stdout == "user\n/home/user\n"
    assert sandbox.commands.run("sudo whoami").stdout == "root\n"


@part
def metrics_are_measured(sandbox):
    deadline = time.monotonic() + 60
    while not (metrics := sandbox.get_metrics()):
        assert time.monotonic() < deadline, "nothing was measured"
        time.sleep(1)
    last = metrics[-1]
    assert last.cpu_count == 1, last
    assert 0 <= last.cpu_used_pct <= 100, last
    assert 0 < last.mem_used < last.mem_total <= 512 << 20, last
    assert 0 < last.disk_used < last.disk_total <= 2 << 30, last


@part
def exit_codes_are_exceptions(sandbox):
    try:
        sandbox.commands.run("echo before; echo why >&2; exit 3")
    except CommandExitException as error:
        assert error.exit_code == 3, error.exit_code
        assert error.stdout == "before\n" and error.stderr == "why\n", (error.stdout, error.stderr)
    else:
        raise AssertionError("exit 3 raised nothing")


@part
def environment_directory_and_user(sandbox):
    assert sandbox.commands.run("echo $COLOUR", envs={"COLOUR": "green"}).stdout == "green\n"
    # What one command was given must not leak into the next.
    assert sandbox.commands.run("echo -$COLOUR-").stdout == "--\n"
    assert sandbox.commands.run("echo $GIVEN_AT_CREATE").stdout == "yes\n"
    assert sandbox.commands.run("pwd", cwd="/tmp").stdout == "/tmp\n"
    assert sandbox.commands.run("id -un", user="root").stdout == "root\n"
    assert sandbox.commands.run("echo $E2B_SANDBOX $E2B_SANDBOX_ID").stdout == f"true {sandbox.sandbox_id}\n"


@part
def a_program_in_the_background_reads_its_input(sandbox):
    heard = []
    handle = sandbox.commands.run("cat", background=True, stdin=True, timeout=60)
    assert any(process.pid == handle.pid for process in sandbox.commands.list())
    sandbox.commands.send_stdin(handle.pid, "hello ")
    sandbox.commands.send_stdin(handle.pid, "there\n")
    sandbox.commands.close_stdin(handle.pid)
    result = handle.wait(on_stdout=heard.append)
    assert result.exit_code == 0 and result.stdout == "hello there\n", result
    assert "".join(heard) == "hello there\n", heard


@part
def a_program_can_be_found_again_and_killed(sandbox):
    handle = sandbox.commands.run("sleep 1000", background=True)
    handle.disconnect()
    again = sandbox.commands.connect(handle.pid)
    assert sandbox.commands.kill(handle.pid) is True
    try:
        again.wait()
    except CommandExitException as error:
        assert "kill" in str(error.error) + str(error), error
    else:
        raise AssertionError("a killed program ended well")
    assert all(process.pid != handle.pid for process in sandbox.commands.list())
    assert sandbox.commands.kill(handle.pid) is False


@part
def a_time_limit_ends_a_command(sandbox):
    start = time.monotonic()
    try:
        sandbox.commands.run("sleep 31415", timeout=2)
    except TimeoutException:
        pass
    else:
        raise AssertionError("no TimeoutException")
    assert time.monotonic() - start < 30
    assert sandbox.commands.run("pgrep -f '[s]leep 31415' || echo none").stdout == "none\n"


@part
def files_are_written_and_read(sandbox):
    files = sandbox.files
    text = "first line\nzweite Zeile: äöü ☃\n"
    info = files.write("notes/today.txt", text)
    assert info.path == "/home/user/notes/today.txt", info
    assert files.read("/home/user/notes/today.txt") == text
    assert sandbox.commands.run("cat notes/today.txt").stdout == text

    data = bytes(range(256)) * 4096
    files.write("/tmp/data.bin", data)
    assert bytes(files.read("/tmp/data.bin", format="bytes")) == data
    assert b"".join(files.read("/tmp/data.bin", format="stream")) == data

    files.write_files([{"path": "/tmp/one", "data": "1"}, {"path": "/tmp/two", "data": "2"}])
    assert (files.read("/tmp/one"), files.read("/tmp/two")) == ("1", "2")


@part
def folders_are_listed_and_changed(sandbox):
    files = sandbox.files
    assert files.make_dir("/tmp/dir/sub") is True
    assert files.make_dir("/tmp/dir/sub") is False
    files.write("/tmp/dir/file", "x" * 10)
    entries = {entry.name: entry for entry in files.list("/tmp/dir")}
    assert set(entries) == {"sub", "file"}, entries
    assert entries["file"].size == 10 and entries["file"].type.value == "file", entries["file"]
    assert entries["sub"].type.value == "dir", entries["sub"]
    assert entries["file"].owner == "user", entries["file"]
    files.rename("/tmp/dir/file", "/tmp/dir/sub/renamed")
    assert files.exists("/tmp/dir/sub/renamed") and not files.exists("/tmp/dir/file")
    files.remove("/tmp/dir")
    assert not files.exists("/tmp/dir")
    try:
        files.read("/tmp/dir/file")
    except NotFoundException as error:
        assert "/tmp/dir/file" in str(error), error
    else:
        raise AssertionError("a file that is gone was read")


@part
def the_guest_agent_refuses_strangers(sandbox):
    # Without the sandbox's own token nobody gets in, whoever knows its id.
    headers = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "49983"}
    base = os.environ["E2B_SANDBOX_URL"]
    for token in (None, "wrong"):
        given = dict(headers, **({"X-Access-Token": token} if token else {}))
        request = urllib.request.Request(f"{base}/files?path=/etc/hostname", headers=given)
        try:
            urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as error:
            assert error.code == 401, error
        else:
            raise AssertionError(f"a file was read with the token {token}")
    # The host's own routes do not exist for anybody outside.
    for method, route in (("POST", "/init"), ("POST", "/snapshot/prepare")):
        request = urllib.request.Request(base + route, data=b"{}", headers=headers, method=method)
        try:
            urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as error:
            assert error.code == 404, (route, error)
        else:
            raise AssertionError(f"{route} answered")


@part
def a_sandbox_tells_about_itself(sandbox):
    info = sandbox.get_info()
    assert info.sandbox_id == sandbox.sandbox_id
    assert info.metadata.get("purpose") == "test", info
    assert info.cpu_count == 1 and info.memory_mb == 512, info
    before = info.end_at
    sandbox.set_timeout(600)
    assert sandbox.get_info().end_at > before
    listed = Sandbox.list(query=None).next_items()
    assert any(one.sandbox_id == sandbox.sandbox_id for one in listed), listed
    same = Sandbox.connect(sandbox.sandbox_id)
    assert same.commands.run("echo connected").stdout == "connected\n"


@part
def mistakes_are_the_clients_own_exceptions(sandbox):
    try:
        Sandbox.create("no-such-template")
    except SandboxException as error:
        assert "no-such-template" in str(error), error
    else:
        raise AssertionError("an unknown template was accepted")
    try:
        Sandbox.create(api_key="e2b_" + "0" * 64)
    except AuthenticationException:
        pass
    else:
        raise AssertionError("a wrong key was accepted")


@part
def a_pause_and_a_connect_lose_nothing(sandbox):
    started = sandbox.commands.run("sleep 600", background=True)
    sandbox.files.write("kept.txt", "kept")
    assert sandbox.pause() is True
    assert sandbox.pause() is False, "it was paused already"
    assert sandbox.is_running() is False
    paused = Sandbox.list(query=None).next_items()
    assert [one.state.value for one in paused if one.sandbox_id == sandbox.sandbox_id] == ["paused"], paused
    sandbox.connect(timeout=300)
    assert sandbox.is_running() is True
    assert sandbox.files.read("kept.txt") == "kept"
    assert started.pid in [process.pid for process in sandbox.commands.list()]
    assert sandbox.commands.kill(started.pid) is True


@part
def forks_and_snapshots_are_sandboxes_of_their_own(sandbox):
    sandbox.files.write("origin.txt", "shared")
    (fork,) = sandbox.fork(timeout=120)
    assert isinstance(fork, Sandbox), fork
    assert fork.sandbox_id != sandbox.sandbox_id
    assert fork.files.read("origin.txt") == "shared"
    fork.files.write("origin.txt", "mine")
    assert sandbox.files.read("origin.txt") == "shared"
    assert fork.kill() is True
    snapshot = sandbox.create_snapshot()
    with Sandbox.create(snapshot.snapshot_id, timeout=120) as copy:
        assert copy.files.read("origin.txt") == "shared"
    assert Sandbox.delete_snapshot(snapshot.snapshot_id) is True
    assert Sandbox.delete_snapshot(snapshot.snapshot_id) is False


@part
def kill_ends_it(sandbox):
    assert sandbox.is_running() is True
    assert sandbox.kill() is True
    assert sandbox.is_running() is False
    assert sandbox.kill() is False
    try:
        sandbox.commands.run("true")
    except SandboxException:
        pass
    except Exception as error:
        assert "not found" in str(error).lower(), repr(error)
    else:
        raise AssertionError("a command ran in a sandbox that was killed")


def main():
    start = time.monotonic()
    sandbox = Sandbox.create(timeout=300, metadata={"purpose": "test"}, envs={"GIVEN_AT_CREATE": "yes"})
    print(f"sandbox {sandbox.sandbox_id}")
    print(f"created in {time.monotonic() - start:.3f} s")
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
        sandbox.kill()
    print(f"{passed} of {len(PARTS)} passed")
    sys.exit(0 if passed == len(PARTS) else 1)


if __name__ == "__main__":
    main()

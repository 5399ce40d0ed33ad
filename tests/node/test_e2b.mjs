// E2B's published npm client, unmodified, against our guest agent.
//
// With E2B_DEBUG=true it speaks to http://localhost:49983 and to nothing else (`envd --no-vm
// --port 49983`; crates/envd/tests/clients.rs does that); with E2B_API_URL, E2B_SANDBOX_URL
// and E2B_API_KEY it makes a real sandbox on that server. By hand:
//
//     E2B_DEBUG=true target/node/python/bin/node target/node/test_e2b.mjs
//
// Prints "ok NAME" for each part and "N of N passed"; exits with 1 after the first failure.

import assert from 'node:assert/strict'
import { CommandExitError, FileNotFoundError, InvalidArgumentError, Sandbox, TimeoutError } from 'e2b'

const debug = process.env.E2B_DEBUG === 'true'
const folder = `/tmp/e2b-node-${process.pid}`
const parts = []
const part = (name, run) => parts.push([name, run])
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms))

/** Waits for what comes in its own time. */
async function until(what, condition) {
  for (let waited = 0; waited < 15000; waited += 20) {
    if (condition()) return
    await sleep(20)
  }
  assert.fail(`not in time: ${what}`)
}

part('a command with streamed output', async (sandbox) => {
  const arrived = []
  const result = await sandbox.commands.run(
    'for i in 1 2 3; do echo line $i; sleep 0.4; done; echo problem >&2',
    { onStdout: (text) => { arrived.push([Date.now(), text]) } },
  )
  assert.equal(result.exitCode, 0)
  assert.equal(result.stdout, 'line 1\nline 2\nline 3\n')
  assert.equal(result.stderr, 'problem\n')
  assert.equal(arrived.map(([, text]) => text).join(''), result.stdout)
  assert.ok(arrived.at(-1)[0] - arrived[0][0] > 400, 'streamed, not handed over at the end')
})

part('exit codes are errors', async (sandbox) => {
  await assert.rejects(
    sandbox.commands.run('echo before; echo why >&2; exit 3'),
    (error) => error instanceof CommandExitError && error.exitCode === 3
      && error.stdout === 'before\n' && error.stderr === 'why\n',
  )
})

part('environment, folder and user', async (sandbox) => {
  const { commands } = sandbox
  assert.equal((await commands.run('echo $COLOUR', { envs: { COLOUR: 'green' } })).stdout, 'green\n')
  assert.equal((await commands.run('echo -$COLOUR-')).stdout, '--\n')
  assert.equal((await commands.run('pwd', { cwd: '/usr' })).stdout, '/usr\n')
  assert.equal((await commands.run('id -un', { user: 'root' })).stdout, 'root\n')
  await assert.rejects(commands.run('pwd', { cwd: '/no/such' }), InvalidArgumentError)
})

part('much output arrives whole', async (sandbox) => {
  const { stdout } = await sandbox.commands.run('seq 1 300000; printf "ä€😀"')
  assert.equal(stdout.length, 1988895 + 'ä€😀'.length)
  assert.ok(stdout.endsWith('300000\nä€😀'))
})

part('standard input', async (sandbox) => {
  const handle = await sandbox.commands.run('cat', { background: true, stdin: true })
  assert.ok((await sandbox.commands.list()).some((one) => one.pid === handle.pid))
  await sandbox.commands.sendStdin(handle.pid, 'hello ')
  await handle.sendStdin(new Uint8Array([0xe2, 0x98, 0x83, 0x0a]))
  await handle.closeStdin()
  const result = await handle.wait()
  assert.deepEqual([result.exitCode, result.stdout], [0, 'hello ☃\n'])
})

part('a program is found again and killed', async (sandbox) => {
  const handle = await sandbox.commands.run('sleep 1000', { background: true })
  await handle.disconnect()
  const again = await sandbox.commands.connect(handle.pid)
  assert.equal(await sandbox.commands.kill(handle.pid), true)
  await assert.rejects(again.wait(), (error) => error instanceof CommandExitError)
  assert.equal(await sandbox.commands.kill(handle.pid), false)
})

part('a time limit ends a command', async (sandbox) => {
  const before = Date.now()
  await assert.rejects(sandbox.commands.run('sleep 27182', { timeoutMs: 1500 }), TimeoutError)
  assert.ok(Date.now() - before < 20000)
  const { stdout } = await sandbox.commands.run("pgrep -f '[s]leep 27182' || echo none")
  assert.equal(stdout, 'none\n')
})

part('a terminal', async (sandbox) => {
  let seen = ''
  const decoder = new TextDecoder()
  const terminal = await sandbox.pty.create({
    cols: 91,
    rows: 33,
    cwd: '/usr',
    onData: (data) => { seen += decoder.decode(data, { stream: true }) },
  })
  const type = (text) => sandbox.pty.sendInput(terminal.pid, new TextEncoder().encode(text))
  await type('stty size; pwd; echo "<$TERM>"\n')
  await until('the size', () => seen.includes('33 91') && seen.includes('<xterm-256color>'))
  assert.ok(seen.includes('/usr'), seen)
  await sandbox.pty.resize(terminal.pid, { cols: 120, rows: 40 })
  await type('stty size\n')
  await until('the new size', () => seen.includes('40 120'))
  await type('exit 7\n')
  await assert.rejects(terminal.wait(), (error) => error.exitCode === 7)
  const other = await sandbox.pty.create({ cols: 80, rows: 24, onData: () => {} })
  assert.equal(await sandbox.pty.kill(other.pid), true)
})

part('files are written and read', async (sandbox) => {
  const { files } = sandbox
  const text = 'first line\nzweite Zeile: äöü ☃\n'
  const info = await files.write(`${folder}/notes/today.txt`, text)
  assert.equal(info.path, `${folder}/notes/today.txt`)
  assert.equal(await files.read(`${folder}/notes/today.txt`), text)
  assert.equal((await sandbox.commands.run(`cat ${folder}/notes/today.txt`)).stdout, text)

  const data = Uint8Array.from({ length: 3_000_000 }, (_, i) => (i * 31) % 251)
  for (const options of [{}, { gzip: true }, { useOctetStream: true }, { useOctetStream: false }]) {
    await files.write(`${folder}/data.bin`, data.buffer, options)
    assert.deepEqual(await files.read(`${folder}/data.bin`, { format: 'bytes' }), data)
  }
  assert.deepEqual(await files.read(`${folder}/data.bin`, { format: 'bytes', gzip: true }), data)
  const blob = await files.read(`${folder}/data.bin`, { format: 'blob' })
  assert.equal(blob.size, data.length)
  let streamed = 0
  for await (const chunk of await files.read(`${folder}/data.bin`, { format: 'stream' })) {
    streamed += chunk.length
  }
  assert.equal(streamed, data.length)

  await files.write(`${folder}/streamed`, new Blob(['by ', 'parts']).stream())
  assert.equal(await files.read(`${folder}/streamed`), 'by parts')
  await files.write(`${folder}/empty`, '')
  assert.equal(await files.read(`${folder}/empty`), '')
  await files.writeFiles([
    { path: `${folder}/one`, data: '1' },
    { path: `${folder}/two`, data: '2' },
  ])
  assert.equal((await files.read(`${folder}/one`)) + (await files.read(`${folder}/two`)), '12')
})

part('files carry metadata', async (sandbox) => {
  // At home, on the disk: the guest's /tmp is in memory, where kernels before 6.6 keep none.
  const { files } = sandbox
  const { path, metadata } = await files.write('e2b-node-labelled', 'x', { metadata: { origin: 'a test' } })
  assert.deepEqual(metadata, { origin: 'a test' })
  assert.deepEqual((await files.getInfo(path)).metadata, { origin: 'a test' })
  await files.remove(path)
})

part('folders are listed and changed', async (sandbox) => {
  const { files } = sandbox
  assert.equal(await files.makeDir(`${folder}/dir/sub`), true)
  assert.equal(await files.makeDir(`${folder}/dir/sub`), false)
  await files.write(`${folder}/dir/file`, 'x'.repeat(10))
  const entries = await files.list(`${folder}/dir`)
  assert.deepEqual(entries.map((entry) => [entry.name, entry.type]), [['file', 'file'], ['sub', 'dir']])
  assert.equal(entries[0].size, 10)
  assert.equal(entries[0].permissions, '-rw-r--r--')
  assert.ok(Math.abs(Date.now() - entries[0].modifiedTime.getTime()) < 60000)
  await files.rename(`${folder}/dir/file`, `${folder}/dir/sub/renamed`)
  assert.equal((await files.list(`${folder}/dir`, { depth: 2 })).length, 2)
  assert.equal(await files.exists(`${folder}/dir/file`), false)
  await files.remove(`${folder}/dir`)
  assert.equal(await files.exists(`${folder}/dir`), false)
  await assert.rejects(files.read(`${folder}/dir/file`), FileNotFoundError)
  await assert.rejects(files.list(`${folder}/dir`), FileNotFoundError)
  await assert.rejects(files.read(folder), InvalidArgumentError)
})

part('a folder is watched', async (sandbox) => {
  const { files } = sandbox
  await files.makeDir(`${folder}/watched`)
  const events = []
  const watch = await files.watchDir(`${folder}/watched`, (event) => { events.push(event) }, {
    recursive: true,
    includeEntry: true,
  })
  await files.write(`${folder}/watched/new`, 'text')
  await until('three events', () => events.length >= 3)
  assert.deepEqual(events.map(({ name, type }) => [name, type]), [['new', 'create'], ['new', 'chmod'], ['new', 'write']])
  assert.equal(events[2].entry.size, 4)
  await files.write(`${folder}/watched/deep/er/file`, 'x')
  await until('the nested file', () => events.some(({ name }) => name === 'deep/er/file'))
  await files.remove(`${folder}/watched/new`)
  await until('the removal', () => events.some(({ name, type }) => name === 'new' && type === 'remove'))
  await watch.stop()
  const told = events.length
  await files.write(`${folder}/watched/late`, 'x')
  await sleep(200)
  assert.equal(events.length, told, 'nothing is told after the stop')
})

part('git', async (sandbox) => {
  const { git, files } = sandbox
  const repository = `${folder}/repository`
  await git.init(repository, { initialBranch: 'main' })
  await git.setConfig('core.abbrev', '12', { scope: 'local', path: repository })
  assert.equal(await git.getConfig('core.abbrev', { scope: 'local', path: repository }), '12')
  await files.write(`${repository}/a.txt`, 'one\n')
  let status = await git.status(repository)
  assert.deepEqual([status.currentBranch, status.hasUntracked, status.hasStaged], ['main', true, false])
  await git.add(repository)
  assert.equal((await git.status(repository)).hasStaged, true)
  await git.commit(repository, 'first', { authorName: 'A', authorEmail: 'a@example.org' })
  assert.equal((await git.status(repository)).isClean, true)
  await git.createBranch(repository, 'side')
  const branches = await git.branches(repository)
  assert.deepEqual([branches.currentBranch, [...branches.branches].sort()], ['side', ['main', 'side']])
  await git.clone(`file://${repository}`, { path: `${folder}/clone`, depth: 1 })
  assert.equal(await files.read(`${folder}/clone/a.txt`), 'one\n')
  await git.remoteAdd(repository, 'other', 'https://example.org/x.git')
  assert.equal(await git.remoteGet(repository, 'other'), 'https://example.org/x.git')
  await files.write(`${repository}/a.txt`, 'two\n')
  await git.restore(repository, { paths: ['a.txt'] })
  assert.equal(await files.read(`${repository}/a.txt`), 'one\n')
  await git.checkoutBranch(repository, 'main')
  await git.deleteBranch(repository, 'side', { force: true })
})

part('a pause and a connect lose nothing', async (sandbox) => {
  if (debug) return
  const sleeper = await sandbox.commands.run('sleep 600', { background: true })
  await sandbox.files.write('kept.txt', 'kept')
  assert.equal(await sandbox.pause(), true)
  assert.equal(await sandbox.pause(), false)
  assert.equal(await sandbox.isRunning(), false)
  await sandbox.connect({ timeoutMs: 300_000 })
  assert.equal(await sandbox.isRunning(), true)
  assert.equal(await sandbox.files.read('kept.txt'), 'kept')
  const running = await sandbox.commands.list()
  assert.ok(running.some((one) => one.pid === sleeper.pid))
  assert.equal(await sandbox.commands.kill(sleeper.pid), true)
})

part('forks and snapshots are sandboxes of their own', async (sandbox) => {
  if (debug) return
  await sandbox.files.write('origin.txt', 'shared')
  const forks = await sandbox.fork({ count: 2 })
  for (const fork of forks) {
    assert.ok(fork instanceof Sandbox, String(fork))
    assert.equal(await fork.files.read('origin.txt'), 'shared')
    await fork.files.write('origin.txt', 'mine')
    assert.equal(await fork.kill(), true)
  }
  assert.equal(await sandbox.files.read('origin.txt'), 'shared')
  const snapshot = await sandbox.createSnapshot()
  const copy = await Sandbox.create(snapshot.snapshotId, { timeoutMs: 120_000 })
  assert.equal(await copy.files.read('origin.txt'), 'shared')
  await copy.kill()
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), true)
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), false)
})

part('the sandbox itself', async (sandbox) => {
  assert.equal(await sandbox.isRunning(), true)
  if (debug) return
  const info = await sandbox.getInfo()
  assert.deepEqual([info.sandboxId, info.metadata], [sandbox.sandboxId, { purpose: 'test' }])
  await sandbox.setTimeout(600_000)
  assert.ok((await sandbox.getInfo()).endAt > info.endAt)
  const listed = await Sandbox.list().nextItems()
  assert.ok(listed.some((one) => one.sandboxId === sandbox.sandboxId))
  const same = await Sandbox.connect(sandbox.sandboxId)
  assert.equal((await same.commands.run('echo connected')).stdout, 'connected\n')
  assert.equal(await sandbox.kill(), true)
  assert.equal(await sandbox.isRunning(), false)
  await assert.rejects(sandbox.commands.run('true'))
})

const sandbox = await Sandbox.create({ timeoutMs: 300_000, metadata: { purpose: 'test' } })
console.log(`sandbox ${sandbox.sandboxId}`)
let passed = 0
for (const [name, run] of parts) {
  const before = Date.now()
  try {
    await run(sandbox)
  } catch (error) {
    console.error(error)
    console.log(`FAILED ${name}`)
    break
  }
  passed += 1
  console.log(`ok ${name} (${Date.now() - before} ms)`)
}
if (debug) await sandbox.commands.run(`rm -rf ${folder}`)
else await sandbox.kill()
console.log(`${passed} of ${parts.length} passed`)
process.exit(passed === parts.length ? 0 : 1)

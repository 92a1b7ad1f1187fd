"""Attempts to get out of the sandbox for generated code: each a program, and how it must end.

A program knows the ``world`` it is not to reach (a dictionary on its standard input: a secret file, a victim,
ports that somebody listens on, ...).  It says ESCAPED where something worked that must not; whether it did harm
is looked at from outside (attacks/world.py).
"""

from __future__ import annotations

from dataclasses import dataclass

PRELUDE = """
import ctypes, os, sys, time
world = eval(sys.stdin.read())
os.set_blocking(1, True)
def attempt(what, act):
    try:
        result = act()
    except BaseException as error:
        print(f"{what}: {type(error).__name__}: {str(error)[:80]}", flush=True)
    else:
        print(f"{what}: ESCAPED {str(result)[:200]}", flush=True)
libc = ctypes.CDLL(None, use_errno=True)
def raw(x86_64, aarch64, *arguments):
    number = x86_64 if os.uname().machine == "x86_64" else aarch64
    result = libc.syscall(number, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def written(path, flags):
    fd = os.open(path, flags, 0o600)
    os.write(fd, b"hurt")
"""


@dataclass(frozen=True)
class Escape:
    """One attempt.  ``ended``: how the program must end.  ``control``: without a sandbox it succeeds, and harms
    nothing but its world; that shows that a success would be seen.
    """

    name: str
    source: str
    ended: str = "exited"
    control: bool = False


FILES = [
    Escape("read-secret", "attempt('read', lambda: open(world['secret']).read())", control=True),
    Escape("read-system", "for p in ('shadow', 'passwd', 'hostname', 'ssh'): attempt(p, lambda: open('/etc/' + p).read(1))"),
    Escape("read-home", "for p in (world['home'], '/root', '/home'): attempt(p, lambda: os.listdir(p)[0])"),
    Escape("list-folder", "attempt('list', lambda: os.listdir(world['folder']))", control=True),
    Escape("read-upwards", """
up = '../' * 40
attempt('up', lambda: open(up + world['secret'][1:]).read())
attempt('cwd', lambda: open('/proc/self/cwd/' + up + world['secret'][1:]).read())
""", control=True),
    Escape("write-victim", "attempt('write', lambda: written(world['victim'], os.O_WRONLY))", control=True),
    Escape("append-victim", "attempt('append', lambda: written(world['victim'], os.O_RDWR | os.O_APPEND))", control=True),
    Escape("create-outside", """
for folder in (world['folder'], '/tmp', '/var/tmp', '/dev/shm', '/dev', world['home'], '/usr/lib', '/', '/proc', '/run'):
    # what is made where nobody outside sees it is no escape: the mark is looked for outside
    try:
        open(folder + '/' + world['mark'], 'w').write('here')
    except OSError as error:
        print(folder, error)
"""),
    Escape("create-beside", "attempt('create', lambda: written(world['folder'] + '/new', os.O_CREAT | os.O_WRONLY))", control=True),
    Escape("truncate", """
attempt('truncate', lambda: os.truncate(world['victim'], 0))
attempt('O_TRUNC', lambda: os.open(world['victim'], os.O_RDONLY | os.O_TRUNC))
attempt('truncate a library', lambda: os.truncate(os.__file__, os.stat(os.__file__).st_size))
attempt('O_RDWR of a library', lambda: os.open(os.__file__, os.O_RDWR))
"""),
    Escape("delete", "attempt('unlink', lambda: os.unlink(world['victim']))", control=True),
    Escape("delete-library", "attempt('unlink', lambda: os.unlink(os.__file__.replace('os.py', world['mark'])))"),
    Escape("rename", "attempt('rename', lambda: os.rename(world['victim'], world['victim'] + '2'))", control=True),
    Escape("swap-for-own", "open('own', 'w').write('x') if os.access('.', os.W_OK) else 0\nattempt('replace', lambda: os.replace('own', world['victim']))"),
    Escape("make-folder", "attempt('mkdir', lambda: os.mkdir(world['folder'] + '/made'))", control=True),
    Escape("chmod", """
attempt('chmod', lambda: os.chmod(world['victim'], 0o777))
attempt('fchmodat2', lambda: raw(452, 452, -100, world['victim'].encode(), 0o777, 0))
attempt('chown', lambda: os.chown(world['victim'], 1, 1))
attempt('utime', lambda: os.utime(world['victim'], (1, 1)))
attempt('setxattr', lambda: os.setxattr(world['victim'], 'user.hurt', b'1'))
attempt('chmod of a library', lambda: os.chmod(os.__file__, os.stat(os.__file__).st_mode & 0o777))
""", control=True),
    Escape("symlink", """
attempt('link to secret', lambda: (os.symlink(world['secret'], 'link'), open('link').read()))
attempt('link outside', lambda: os.symlink('/etc', world['folder'] + '/link'))
""", control=True),
    Escape("hard-link", """
attempt('link of secret', lambda: (os.link(world['secret'], 'hard'), open('hard').read()))
attempt('link outside', lambda: os.link(world['secret'], world['folder'] + '/hard'))
"""),
    Escape("file-handle", """
handle = ctypes.create_string_buffer(b'\\x80' + bytes(200))
mount = ctypes.c_int()
attempt('name_to_handle_at', lambda: raw(303, 264, -100, world['secret'].encode(), handle, ctypes.byref(mount), 0))
attempt('open_by_handle_at', lambda: raw(304, 265, -100, handle, 0))
"""),
    Escape("openat2", "how = ctypes.create_string_buffer(24)\nattempt('openat2', lambda: raw(437, 437, -100, world['secret'].encode(), how, 24))"),
    Escape("devices", """
import glob
for path in ('/dev/mem', '/dev/kmsg', '/dev/port', '/dev/tty', '/dev/ptmx', '/dev/fuse', '/dev/kvm', '/dev/net/tun',
             '/dev/vda', '/dev/sda', '/dev/nvme0n1', '/dev/loop0', '/dev/loop-control', '/dev/userfaultfd'):
    attempt(path, lambda: os.open(path, os.O_RDONLY))
attempt('mknod', lambda: os.mknod('disk', 0o60666, os.makedev(254, 0)))
"""),
    Escape("watch-files", "attempt('inotify', lambda: raw(294, 26, 0))\nattempt('fanotify', lambda: raw(300, 262, 0, 0))"),
]  # fmt: skip

PROC = [
    Escape("parent-in-proc", """
for pid in (os.getppid(), world['parent'], 1):
    for name in ('mem', 'environ', 'cmdline', 'maps', 'auxv'):
        attempt(name, lambda: open(f'/proc/{pid}/{name}', 'rb').read(1))
    attempt('fd', lambda: os.listdir(f'/proc/{pid}/fd'))
    attempt('root', lambda: os.listdir(f'/proc/{pid}/root/tmp'))
    attempt('cwd', lambda: open(f'/proc/{pid}/cwd/' + '../' * 40 + world['secret'][1:]).read())
"""),
    Escape("rewrite-interpreter", """
attempt('exe', lambda: os.open('/proc/self/exe', os.O_RDWR))
attempt('file', lambda: os.open(world['python'], os.O_RDWR))
attempt('unlink', lambda: os.unlink(world['python'] + world['mark']))
"""),
    Escape("kernel-settings", """
for path in ('/proc/sys/kernel/core_pattern', '/proc/sysrq-trigger', '/proc/sys/kernel/modprobe', '/sys/kernel/mm/ksm/run'):
    attempt(path, lambda: os.open(path, os.O_WRONLY))
attempt('/sys', lambda: os.listdir('/sys'))
attempt('cgroup', lambda: os.listdir('/sys/fs/cgroup'))
"""),
    Escape("environment", "attempt('environ', lambda: os.environ[world['variable']])\nprint(os.environ)", control=True),
    Escape("inherited-files", """
for fd in range(3, 64):
    try:
        print(fd, os.pread(fd, 100, 0))
    except OSError as error:
        pass
""", control=True),
]  # fmt: skip

NETWORK = [
    Escape("tcp", "import socket\nattempt('tcp', lambda: socket.create_connection(('127.0.0.1', world['tcp']), 1))", control=True),
    Escape("udp", """
import socket
attempt('udp', lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'out', ('127.0.0.1', world['udp'])))
""", control=True),
    Escape("unix-socket", "import socket\nattempt('unix', lambda: socket.socket(socket.AF_UNIX).connect(world['unix']))", control=True),
    Escape("abstract-socket", "import socket\nattempt('unix', lambda: socket.socket(socket.AF_UNIX).connect('\\0' + world['mark']))", control=True),
    Escape("other-sockets", """
import socket
for family, kind, protocol in ((16, 3, 0), (17, 3, 768), (2, 3, 1), (38, 5, 0), (40, 1, 0), (10, 1, 0), (2, 1, 262), (30, 1, 0)):
    attempt(family, lambda: socket.socket(family, kind, protocol))
attempt('pair', socket.socketpair)
"""),
    Escape("listen", "import socket\nattempt('listen', lambda: socket.create_server(('0.0.0.0', 0)))"),
    Escape("names", "import socket\nattempt('dns', lambda: socket.getaddrinfo('example.org', 80))"),
    Escape("http", "import urllib.request\nattempt('http', lambda: urllib.request.urlopen(f\"http://127.0.0.1:{world['tcp']}\", timeout=1))"),
    Escape("io-uring", "attempt('setup', lambda: raw(425, 425, 8, ctypes.create_string_buffer(120)))"),
]  # fmt: skip

RESOURCES = [
    Escape("fork-bomb", "attempt('fork', lambda: [os.fork() for _ in range(12)])"),
    Escape("other-forks", """
attempt('vfork', lambda: raw(58, 220, 17, 0, 0, 0, 0))
attempt('clone', lambda: raw(56, 220, 17, 0, 0, 0, 0))
attempt('clone into namespaces', lambda: raw(56, 220, 0x7E020000 | 17, 0, 0, 0, 0))
attempt('clone3', lambda: raw(435, 435, (ctypes.c_uint64 * 8)(0, 0, 0, 0, 17), 64))
attempt('spawn', lambda: os.posix_spawn(world['python'], ['python'], {}))
import multiprocessing
attempt('multiprocessing', lambda: multiprocessing.get_context('fork').Process(target=print).start())
"""),
    Escape("thread-bomb", """
import threading
attempt('threads', lambda: [threading.Thread(target=time.sleep, args=(9,), daemon=True).start() for _ in range(10000)])
"""),
    Escape("memory-bomb", "attempt('bytes', lambda: len(bytearray(world['memory'])))\nattempt('list', lambda: len([0] * world['memory']))"),
    Escape("memory-bomb-slow", "kept = []\nwhile True: kept.append(bytearray(1 << 20))"),
    Escape("memory-maps", """
import mmap
attempt('private', lambda: mmap.mmap(-1, world['memory'], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
attempt('shared', lambda: mmap.mmap(-1, world['memory']))
attempt('locked', lambda: libc.mlock(ctypes.create_string_buffer(1 << 20), 1 << 20) and 1 / 0)
attempt('memfd', lambda: os.memfd_create('more'))
attempt('memfd_secret', lambda: raw(447, 447, 0))
"""),
    Escape("raise-limits", """
import resource
for which in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
    soft, hard = resource.getrlimit(which)
    attempt(which, lambda: resource.setrlimit(which, (hard + 1, hard + 1)))
    attempt(which, lambda: resource.prlimit(os.getppid(), which))
    attempt(which, lambda: resource.prlimit(world['parent'], which, (0, 0)))
"""),
    Escape("fill-disk", """
total = 0
try:
    for number in range(50):
        with open(f'file{number}', 'wb', 0) as out:
            for _ in range(8):
                total += out.write(bytes(1 << 18))
except OSError as error:
    print(error)
if total > world['disk']: print('ESCAPED', total)
"""),
    Escape("sparse-file", """
attempt('seek', lambda: (lambda f: (f.seek(1 << 40), f.write(b'x'), f.flush()))(open('sparse', 'wb', 0)))
attempt('ftruncate', lambda: os.ftruncate(os.open('sparse2', os.O_CREAT | os.O_RDWR), 1 << 40))
attempt('fallocate', lambda: os.posix_fallocate(os.open('sparse3', os.O_CREAT | os.O_RDWR), 0, 1 << 30))
"""),
    Escape("many-files", """
made = 0
try:
    for made in range(3000):
        open(world['mark'] + str(made), 'w').close()
except OSError as error:
    print(error)
print(made)
"""),
    Escape("open-files", "kept = []\nattempt('open', lambda: [kept.append(open('/dev/null')) for _ in range(world['files'])])"),
    Escape("flood-stdout", "while True: os.write(1, b'x' * 65536)", "signal"),
    Escape("flood-stderr", "while True: os.write(2, b'x' * 65536)", "signal"),
    Escape("endless-loop", "while True: pass", "timeout"),
    Escape("sleep", "time.sleep(1000)", "timeout"),
    Escape("ignore-signals", """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""", "timeout"),
    Escape("close-streams", "os.close(0); os.close(1); os.close(2)\nwhile True: time.sleep(1)", "timeout"),
    Escape("never-reads", "os.close(0); time.sleep(1000)", "timeout"),
    Escape("deep-recursion", "sys.setrecursionlimit(10**9)\ndef f(n): return max(f(n + 1), f(n + 2), key=lambda x: f(x))\nf(0)", "any"),
    Escape("huge-number", "attempt('print', lambda: print(len(str(7 ** 7 ** 9))))", "any"),
]  # fmt: skip

PROCESSES = [
    Escape("signals", """
import signal
for pid in (world['parent'], os.getppid(), -1, 0, 1, -world['parent']):
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP, signal.SIGUSR1):
        attempt(pid, lambda: os.kill(pid, number))
attempt('killpg', lambda: os.killpg(os.getpgid(0), 9))
attempt('tgkill', lambda: raw(234, 131, world['parent'], world['parent'], 10))
attempt('tkill', lambda: raw(200, 130, world['parent'], 10))
attempt('sigqueue', lambda: raw(129, 138, world['parent'], 10, ctypes.create_string_buffer(128)))
attempt('pidfd', lambda: raw(434, 434, world['parent'], 0))
"""),
    Escape("signals-by-owner", """
import fcntl, signal
reading, writing = os.pipe()
attempt('F_SETOWN', lambda: fcntl.fcntl(reading, fcntl.F_SETOWN, world['parent']))
attempt('F_SETSIG', lambda: fcntl.fcntl(reading, 10, signal.SIGUSR1))
attempt('FIOSETOWN', lambda: fcntl.ioctl(reading, 0x8901, world['parent'].to_bytes(4, 'little')))
"""),
    Escape("ptrace", """
for pid in (world['parent'], os.getppid(), 1):
    attempt('attach', lambda: raw(101, 117, 16, pid, 0, 0))
    attempt('seize', lambda: raw(101, 117, 0x4206, pid, 0, 0))
attempt('traceme', lambda: raw(101, 117, 0, 0, 0, 0))
"""),
    Escape("memory-of-others", """
buffer = ctypes.create_string_buffer(16)
part = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 16)
for pid in (world['parent'], os.getppid(), 1):
    attempt('process_vm_readv', lambda: raw(310, 270, pid, part, 1, part, 1, 0))
    attempt('process_vm_writev', lambda: raw(311, 271, pid, part, 1, part, 1, 0))
    attempt('kcmp', lambda: raw(312, 272, pid, pid, 0, 0, 0))
attempt('pidfd_getfd', lambda: raw(438, 438, 3, 0, 0))
"""),
    Escape("daemon", """
def detach():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True: time.sleep(1)
attempt('detach', detach)
attempt('setsid', os.setsid)
attempt('setpgid', lambda: os.setpgid(0, 0))
"""),
    Escape("other-programs", """
import subprocess
attempt('system', lambda: 1 / (os.system('id') == 0))
attempt('run', lambda: subprocess.run(['/bin/sh', '-c', 'id']))
attempt('python', lambda: os.execv(world['python'], ['python', '-c', 'print("ESCAPED")']))
attempt('execveat', lambda: raw(322, 281, -100, b'/bin/sh', None, None, 0))
attempt('loader', lambda: os.execv('/lib64/ld-linux-x86-64.so.2', ['ld.so', '/bin/sh']))
""", control=True),
    Escape("program-in-memory", """
fd = os.memfd_create('program') if hasattr(os, 'memfd_create') else -1
os.write(fd, b'#!/bin/sh\\necho ESCAPED')
os.execve(fd, ['program'], {})
"""),
    Escape("become-root", """
attempt('setuid', lambda: os.setuid(0) if os.getuid() else 1 / 0)
attempt('setresuid', lambda: os.setresuid(0, 0, 0))
attempt('setgroups', lambda: os.setgroups([0]))
attempt('setfsuid', lambda: raw(122, 151, 0))
attempt('capset', lambda: raw(126, 91, ctypes.create_string_buffer(b'\\x22\\x05\\x08\\x20' + bytes(4)), ctypes.create_string_buffer(b'\\xff' * 24)))
"""),
    Escape("namespaces", """
for flag in (0x20000, 0x10000000, 0x20000000, 0x40000000, 0x8000000, 0x10020000):
    attempt('unshare', lambda: raw(272, 97, flag))
attempt('setns', lambda: raw(308, 268, 0, 0))
attempt('chroot', lambda: os.chroot('/'))
attempt('mount', lambda: raw(165, 40, b'none', b'/tmp', b'tmpfs', 0, None))
attempt('umount', lambda: raw(166, 39, b'/tmp', 2))
attempt('pivot_root', lambda: raw(155, 41, b'.', b'.'))
attempt('open_tree', lambda: raw(428, 428, -100, b'/', 1))
attempt('fsopen', lambda: raw(430, 430, b'tmpfs', 0))
"""),
    Escape("undo-walls", """
attempt('no_new_privs', lambda: raw(157, 167, 38, 0, 0, 0, 0))
attempt('parent death', lambda: raw(157, 167, 1, 0, 0, 0, 0))
attempt('dumpable', lambda: raw(157, 167, 4, 1, 0, 0, 0))
attempt('keep capabilities', lambda: raw(157, 167, 8, 1, 0, 0, 0))
attempt('subreaper', lambda: raw(157, 167, 36, 1, 0, 0, 0))
attempt('listener', lambda: raw(317, 277, 1, 8, ctypes.create_string_buffer(16)))
attempt('landlock', lambda: raw(444, 444, None, 0, 1))
"""),
    Escape("other-table-x32", "raw(0x40000000 + 39, 0xFFFFFF)", "any"),
    Escape("other-table-i386", """
import mmap
if os.uname().machine == 'x86_64':
    code = mmap.mmap(-1, 4096, prot=7)
    code.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')  # eax = getpid; int 0x80; return
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    print('ESCAPED', ctypes.CFUNCTYPE(ctypes.c_int)(address)())
""", "any"),
    Escape("kernel-calls", """
attempt('keyctl', lambda: raw(250, 219, 0, -3, 0))
attempt('add_key', lambda: raw(248, 217, b'user', b'key', b'x', 1, -3))
attempt('bpf', lambda: raw(321, 280, 0, ctypes.create_string_buffer(128), 128))
attempt('userfaultfd', lambda: raw(323, 282, 1))
attempt('perf_event_open', lambda: raw(298, 241, ctypes.create_string_buffer(b'\\1' + bytes(127)), 0, -1, -1, 0))
attempt('init_module', lambda: raw(175, 105, b'', 0, b''))
attempt('kexec_load', lambda: raw(246, 104, 0, 0, None, 0))
attempt('reboot', lambda: raw(169, 142, 0, 0, 0, None))
attempt('swapon', lambda: raw(167, 224, b'/x', 0))
attempt('acct', lambda: raw(163, 89, None))
attempt('settimeofday', lambda: raw(164, 170, None, None))
attempt('sethostname', lambda: raw(170, 161, b'x', 1))
attempt('syslog', lambda: raw(103, 116, 10, None, 0))
attempt('quotactl', lambda: raw(179, 60, 0, None, 0, None))
attempt('setpriority', lambda: os.setpriority(os.PRIO_PROCESS, world['parent'], 19))
attempt('sched_setaffinity', lambda: os.sched_setaffinity(0, {0}))
attempt('ioprio_set', lambda: raw(251, 30, 1, 0, 0))
attempt('move_pages', lambda: raw(279, 239, world['parent'], 0, None, None, None, 0))
"""),
    Escape("shared-memory", """
attempt('shmget', lambda: raw(29, 194, world['key'], 4096, 0o1666))
attempt('semget', lambda: raw(64, 190, world['key'], 1, 0o1666))
attempt('msgget', lambda: raw(68, 186, world['key'], 0o1666))
attempt('mq_open', lambda: raw(240, 180, world['mark'].encode(), 0o102, 0o600, None))
from multiprocessing import shared_memory
attempt('posix', lambda: shared_memory.SharedMemory(world['mark'], True, 4096))
"""),
    Escape("terminal", """
import fcntl
for fd in (0, 1, 2):
    attempt('TIOCSTI', lambda: fcntl.ioctl(fd, 0x5412, b'x'))
    attempt('TIOCLINUX', lambda: fcntl.ioctl(fd, 0x541C, b'x'))
    attempt('TIOCSCTTY', lambda: fcntl.ioctl(fd, 0x540E, 1))
    attempt('TIOCSTI, upper half set', lambda: raw(16, 29, fd, 0x5412 | 1 << 32, b'x'))
"""),
    Escape("exit-at-once", "os._exit(0)"),
    Escape("garbage", "os.write(1, bytes(range(256)) * 100); os.write(2, b'\\xff\\x00' * 1000)"),
]  # fmt: skip

ESCAPES = FILES + PROC + NETWORK + RESOURCES + PROCESSES

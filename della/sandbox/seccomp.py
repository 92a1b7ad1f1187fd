"""The system calls that generated code may make, as a filter for the kernel: a list of what is allowed.

What is on no list is refused: sockets, other programs, signals, threads, ptrace, mounts, namespaces, keys,
System V memory, memfd, bpf, chmod.  For numbers from 424 up, which all machines share, the answer is that the
kernel does not know them, and the C library goes the older way (clone3, openat2); io_uring is among them.
"""

from __future__ import annotations

import errno
import platform
import struct

# By name, the numbers on x86_64 and aarch64; None where a machine has no such call.
_ALWAYS: dict[str, tuple[int | None, int | None]] = {
    # memory and time
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "msync": (26, 227), "madvise": (28, 233), "membarrier": (324, 283), "getrandom": (318, 278),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "time": (201, None),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "times": (100, 153),
    # files: reading, and writing to what is open
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "lseek": (8, 62), "close": (3, 57),
    "close_range": (436, 436), "fstat": (5, 80), "stat": (4, None), "lstat": (6, None), "access": (21, None),
    "newfstatat": (262, 79), "statx": (332, 291), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents": (78, None), "getdents64": (217, 61),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "umask": (95, 166), "fsync": (74, 82),
    "fdatasync": (75, 83), "fadvise64": (221, 223), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73), "select": (23, None),
    "pselect6": (270, 72), "eventfd2": (290, 19), "epoll_create": (213, None), "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441),
    # the process itself
    "exit": (60, 93), "exit_group": (231, 94), "futex": (202, 98), "futex_waitv": (449, 449),
    "rseq": (334, 293), "set_robust_list": (273, 99), "set_tid_address": (218, 96),
    "restart_syscall": (219, 128), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136), "sigaltstack": (131, 132), "alarm": (37, None),
    "setitimer": (38, 103), "getitimer": (36, 102), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "getcpu": (309, 168), "getpriority": (140, 141), "getpid": (39, 172),
    "gettid": (186, 178), "getppid": (110, 173), "getpgid": (121, 155), "getsid": (124, 156),
    "getpgrp": (111, None), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getgroups": (115, 158), "getresuid": (118, 148), "getresgid": (120, 150),
    "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179), "uname": (63, 160),
}  # fmt: skip
_WRITING: dict[str, tuple[int | None, int | None]] = {
    "ftruncate": (77, 46), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "unlink": (87, None),
    "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
}  # fmt: skip
_FORKING: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "wait4": (61, 260), "waitid": (247, 95),
}  # fmt: skip
# What a child may no longer do: start processes, and undo the alarm that ends it.
_CHILD: dict[str, tuple[int | None, int | None]] = {
    **_FORKING, "clone": (56, 220), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "alarm": (37, None), "setitimer": (38, 103),
}  # fmt: skip

_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_NR, _ARCH, _ARGS = 0, 4, 16  # where they stand in the kernel's struct seccomp_data
_X32 = 0x40000000  # the other table of x86_64
_FIRST_SHARED = 424
# open for writing, creating, emptying, or a file without a name
_OPEN_TO_WRITE = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000
_FCNTL = (0, 1, 2, 3, 4, 1030)  # F_DUPFD to F_SETFL, F_DUPFD_CLOEXEC; not F_SETOWN, which sends signals
_IOCTL = (
    0x5401,
    0x802C542A,
    0x5413,
    0x541B,
    0x5421,
    0x5450,
    0x5451,
)  # is it a terminal, FIONREAD, FIONBIO, FIOCLEX
_SET_SECCOMP = 22
_FORK_FLAGS, _SIGCHLD = (
    0x01200000,
    17,
)  # CLONE_CHILD_SETTID and _CLEARTID: what fork() passes, and nothing else

Instruction = tuple[int, int, int, int]


def machine() -> str | None:
    """``x86_64`` or ``aarch64``, or None: no filter is known for this machine."""
    name = platform.machine()
    return name if name in _AUDIT and struct.calcsize("P") == 8 else None


def filter_of(name: str, *, writing: bool, forking: bool) -> bytes:
    """The filter for machine ``name``: an array of struct sock_filter.

    writing: files may be made and written, where the file system and Landlock allow it.  forking: processes
    may be started; threads never.
    """
    calls = _ALWAYS | (_WRITING if writing else {}) | (_FORKING if forking else {})
    program = _start(name)
    for each in _numbers(calls, name):
        program += _if(each, [(_RETURN, 0, 0, _ALLOW)])
    program += _if(_number((72, 25), name), _one_of(1, _FCNTL))
    program += _if(_number((16, 29), name), _one_of(1, _IOCTL))
    program += _if(_number((302, 261), name), _one_of(0, (0,)))  # prlimit64, of the process itself
    for open_call, flags in (((2, None), 1), ((257, 56), 2)):
        number = _number(open_call, name)
        if number is not None:
            program += _if(number, [(_RETURN, 0, 0, _ALLOW)] if writing else _read_only(flags))
    if forking:
        fork = [_argument(0), (_AND, 0, 0, ~_FORK_FLAGS & 0xFFFFFFFF), *_either(_EQUAL, _SIGCHLD, _ALLOW)]
        program += _if(_number((56, 220), name), fork)
        program += _if(
            _number((157, 167), name), _one_of(0, (_SET_SECCOMP,))
        )  # prctl: for the children's filter
    program += [(_AT_LEAST, 0, 1, _FIRST_SHARED), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    return _packed([*program, (_RETURN, 0, 0, _ERRNO | errno.EPERM)])


def child_filter(name: str) -> bytes:
    """What a child adds before it runs generated code: no process of its own, no way past its alarm."""
    program = _start(name)
    for number in _numbers(_CHILD, name):
        program += _if(number, [(_RETURN, 0, 0, _ERRNO | errno.EPERM)])
    return _packed([*program, (_RETURN, 0, 0, _ALLOW)])


def _start(name: str) -> list[Instruction]:
    """Ends the process at a call through another table (32 bits, x32); then the number is loaded."""
    program = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, _AUDIT[name]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NR)]
    if name == "x86_64":
        program += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    return program


def _number(numbers: tuple[int | None, int | None], name: str) -> int | None:
    return numbers[list(_AUDIT).index(name)]


def _numbers(calls: dict[str, tuple[int | None, int | None]], name: str) -> list[int]:
    return [number for each in calls.values() if (number := _number(each, name)) is not None]


def _if(number: int | None, then: list[Instruction]) -> list[Instruction]:
    """``then``, which ends in a return on every path, for the call ``number``."""
    assert number is not None
    return [(_EQUAL, 0, len(then), number), *then]


def _argument(index: int) -> Instruction:
    """Loads the low half of an argument: all that the kernel looks at where these are checked."""
    return (_LOAD, 0, 0, _ARGS + 8 * index)


def _either(test: int, value: int, met: int, otherwise: int = _ERRNO | errno.EPERM) -> list[Instruction]:
    return [(test, 0, 1, value), (_RETURN, 0, 0, met), (_RETURN, 0, 0, otherwise)]


def _one_of(index: int, values: tuple[int, ...]) -> list[Instruction]:
    tests: list[Instruction] = []
    for value in values:
        tests += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return [_argument(index), *tests, (_RETURN, 0, 0, _ERRNO | errno.EPERM)]


def _read_only(flags: int) -> list[Instruction]:
    return [_argument(flags), *_either(_ANY_BIT, _OPEN_TO_WRITE, _ERRNO | errno.EROFS, _ALLOW)]


def _packed(program: list[Instruction]) -> bytes:
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)

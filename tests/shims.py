"""File systems that behave oddly, made of functions that stand before those of the C library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# What all have: whether a descriptor is of a file whose name has ".gguf" in it, and a note that the oddity was met.
COMMON = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/vfs.h>
#include <unistd.h>

static int is_model(int fd) {
    char link[64], name[4096];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, name, sizeof(name) - 1);
    if (n < 0) return 0;
    name[n] = 0;
    return strstr(name, ".gguf") != NULL;
}

static void met(void) {
    const char *name = getenv("SHIM_MET");
    int fd = name ? open(name, O_WRONLY | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (fd >= 0) close(fd);
}
"""

# A network mount on which the kernel's copying ends with SHIM_ERRNO (0: copies nothing) after SHIM_AFTER good calls.
COPY_FAILS = r"""
ssize_t copy_file_range(int in, off64_t *at, int out, off64_t *to, size_t size, unsigned flags) {
    static int calls;
    if (__atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED) > atoi(getenv("SHIM_AFTER"))) {
        met();
        errno = atoi(getenv("SHIM_ERRNO"));
        return errno == 0 ? 0 : -1;
    }
    ssize_t (*real)(int, off64_t *, int, off64_t *, size_t, unsigned) = dlsym(RTLD_NEXT, "copy_file_range");
    return real(in, at, out, to, size > 4096 ? 4096 : size, flags);
}
int fstatfs(int fd, struct statfs *status) {
    int (*real)(int, struct statfs *) = dlsym(RTLD_NEXT, "fstatfs");
    int result = real(fd, status);
    if (result == 0) status->f_type = 0x6969;  // NFS
    return result;
}
"""

# A file system that says of a file with data that it is one hole.
HOLES_LIE = r"""
off_t lseek(int fd, off_t offset, int whence) {
    off_t (*real)(int, off_t, int) = dlsym(RTLD_NEXT, "lseek");
    if (whence == SEEK_DATA && is_model(fd)) {
        met();
        errno = ENXIO;
        return -1;
    }
    return real(fd, offset, whence);
}
"""

# Mounts without shared maps (FUSE with direct I/O), or with SHIM_ALL without any.
NO_MAPS = r"""
void *mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset) {
    void *(*real)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, "mmap");
    if (fd >= 0 && ((flags & MAP_SHARED) || getenv("SHIM_ALL")) && is_model(fd)) {
        met();
        errno = ENODEV;
        return MAP_FAILED;
    }
    return real(address, size, protection, flags, fd, offset);
}
"""


class Shim:
    """Has a process run on a file system that behaves oddly: ``run(script, within=shim(…))``."""

    def __init__(self, folder: Path, source: str):
        compiler = shutil.which("cc") or shutil.which("gcc")
        if sys.platform != "linux" or compiler is None:
            pytest.skip("needs LD_PRELOAD and a C compiler")
        self._met = folder / "met"
        self._library = folder / "shim.so"
        (folder / "shim.c").write_text(COMMON + source)
        command = [compiler, "-shared", "-fPIC", "-w", folder / "shim.c", "-o", self._library, "-ldl"]
        subprocess.run(command, check=True)

    def __call__(self, **settings: object) -> tuple[str, ...]:
        self._met.unlink(missing_ok=True)
        before = os.environ.get("LD_PRELOAD", "")
        values = {"LD_PRELOAD": f"{before}:{self._library}".lstrip(":"), "SHIM_MET": self._met} | settings
        return ("env", *(f"{name}={value}" for name, value in values.items()))

    @property
    def was_met(self) -> bool:
        """Whether the oddity was met since the last call."""
        return self._met.exists()

/* LD_PRELOAD: SIGKILL to this process at the n-th change that it makes to a file system.

   Writes to regular files, syncs, renames, new and removed files and folders are counted, in every thread and whatever the
   language of the caller. At the n-th a write is cut in half, everything else is left undone. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long left = 0; /* 0: count nothing */
static atomic_long seen = 0;

void kill_at(long n) {
    seen = 0;
    left = n;
}

long changes_seen(void) { return seen; }

static int is_last(void) {
    if (left == 0) return 0;
    seen++;
    return atomic_fetch_sub(&left, 1) == 1;
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static int is_file(int fd) {
    struct stat s;
    return fstat(fd, &s) == 0 && S_ISREG(s.st_mode);
}

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
    ssize_t (*real)(int, const void *, size_t) = REAL(write, ssize_t(*)(int, const void *, size_t));
    if (is_file(fd) && is_last()) {
        real(fd, data, size / 2);
        die();
    }
    return real(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    ssize_t (*real)(int, const struct iovec *, int) = REAL(writev, ssize_t(*)(int, const struct iovec *, int));
    if (is_file(fd) && is_last()) {
        real(fd, parts, count / 2);
        die();
    }
    return real(fd, parts, count);
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) {
    ssize_t (*real)(int, int, off64_t *, size_t) = REAL(sendfile64, ssize_t(*)(int, int, off64_t *, size_t));
    struct stat s;
    if (is_file(out) && is_last()) {
        real(out, in, offset, fstat(in, &s) == 0 ? s.st_size / 2 : 1);
        die();
    }
    return real(out, in, offset, size);
}

#define DIES(name, declared, passed)                       \
    int name declared {                                    \
        if (is_last()) die();                              \
        return REAL(name, int(*) declared) passed;         \
    }

DIES(fsync, (int fd), (fd))
DIES(fdatasync, (int fd), (fd))
DIES(rename, (const char *from, const char *to), (from, to))
DIES(renameat, (int a, const char *from, int b, const char *to), (a, from, b, to))
DIES(mkdir, (const char *path, mode_t mode), (path, mode))
DIES(rmdir, (const char *path), (path))
DIES(unlink, (const char *path), (path))
DIES(unlinkat, (int folder, const char *path, int flags), (folder, path, flags))
DIES(symlink, (const char *to, const char *path), (to, path))

static int opened(const char *name, const char *path, int flags, va_list rest) {
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    if (flags & O_CREAT && is_last()) die();
    return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, name))(path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    int fd = opened("open", path, flags, rest);
    va_end(rest);
    return fd;
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    int fd = opened("open64", path, flags, rest);
    va_end(rest);
    return fd;
}

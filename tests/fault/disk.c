/* A disk that is full or slow, in front of the C library of a server: `disk.rs` says what it does, and what it does not. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* One file, mapped by every process of the server; `disk.rs` writes and reads it by these offsets. */
struct control {
    _Atomic uint64_t full;
    _Atomic uint64_t slow_ms;
    _Atomic uint64_t attached;
    _Atomic uint64_t refused;
    _Atomic uint64_t slowed;
};

static struct control *control;
static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
static ssize_t (*real_pwritev)(int, const struct iovec *, int, off_t);
static int (*real_ftruncate)(int, off_t);
static int (*real_fallocate)(int, int, off_t, off_t);
static int (*real_posix_fallocate)(int, off_t, off_t);
static int (*real_fsync)(int);
static int (*real_fdatasync)(int);

/* Before the server's main: its processes inherit the mapping. A server that would run without it must not run. */
__attribute__((constructor)) static void attach(void)
{
    static struct control fair;
    real_write = dlsym(RTLD_NEXT, "write");
    real_pwrite = dlsym(RTLD_NEXT, "pwrite");
    real_pwritev = dlsym(RTLD_NEXT, "pwritev");
    real_ftruncate = dlsym(RTLD_NEXT, "ftruncate");
    real_fallocate = dlsym(RTLD_NEXT, "fallocate");
    real_posix_fallocate = dlsym(RTLD_NEXT, "posix_fallocate");
    real_fsync = dlsym(RTLD_NEXT, "fsync");
    real_fdatasync = dlsym(RTLD_NEXT, "fdatasync");
    control = &fair;
    const char *path = getenv("FAULT_DISK");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *shared = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (shared == MAP_FAILED) {
        fprintf(stderr, "FAULT_DISK=%s cannot be mapped: %s\n", path ? path : "", strerror(errno));
        _exit(EXIT_FAILURE);
    }
    close(fd);
    control = shared;
    control->attached++;
}

/* The processes of Postgres have the data folder as their working folder. */
static int in_data_folder(int fd)
{
    char name[32], file[PATH_MAX], folder[PATH_MAX];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(name, file, sizeof file - 1);
    if (length < 0 || !getcwd(folder, sizeof folder))
        return 0;
    file[length] = '\0';
    size_t prefix = strlen(folder);
    return strncmp(file, folder, prefix) == 0 && file[prefix] == '/';
}

/* Whether there is no room for a file to reach up to `end`. */
static int no_room(int fd, off_t end)
{
    struct stat now;
    if (!control->full || fstat(fd, &now) != 0 || !S_ISREG(now.st_mode) || end <= now.st_size || !in_data_folder(fd))
        return 0;
    control->refused++;
    errno = ENOSPC;
    return 1;
}

ssize_t write(int fd, const void *bytes, size_t length)
{
    if (control->full) {
        int append = fcntl(fd, F_GETFL) & O_APPEND;
        off_t from = lseek(fd, 0, append ? SEEK_END : SEEK_CUR);
        if (from >= 0 && no_room(fd, from + (off_t)length))
            return -1;
    }
    return real_write(fd, bytes, length);
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t from)
{
    return no_room(fd, from + (off_t)length) ? -1 : real_pwrite(fd, bytes, length, from);
}

ssize_t pwritev(int fd, const struct iovec *pieces, int count, off_t from)
{
    off_t end = from;
    for (int i = 0; i < count; i++)
        end += (off_t)pieces[i].iov_len;
    return no_room(fd, end) ? -1 : real_pwritev(fd, pieces, count, from);
}

int ftruncate(int fd, off_t size)
{
    return no_room(fd, size) ? -1 : real_ftruncate(fd, size);
}

int fallocate(int fd, int mode, off_t from, off_t length)
{
    return no_room(fd, from + length) ? -1 : real_fallocate(fd, mode, from, length);
}

int posix_fallocate(int fd, off_t from, off_t length)
{
    return no_room(fd, from + length) ? ENOSPC : real_posix_fallocate(fd, from, length);
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* Before the real one, so that what is waited for is not yet safe. In small steps: it ends when the disk is mended. */
static void dawdle(void)
{
    if (!control->slow_ms)
        return;
    control->slowed++;
    int64_t since = now_ns();
    while (now_ns() - since < (int64_t)control->slow_ms * 1000000)
        nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
}

int fsync(int fd)
{
    dawdle();
    return real_fsync(fd);
}

int fdatasync(int fd)
{
    dawdle();
    return real_fdatasync(fd);
}

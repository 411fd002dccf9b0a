/* Loaded by LD_PRELOAD: the n-th call on a file below a folder fails with an errno, is cut short, or kills its process.
   One page of a file that all processes map holds the orders and the count, so that n means the same whoever calls. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

enum { OPEN = 1, WRITE = 2, FSYNC = 4, FLOCK = 8, RENAME = 16, LINK = 32, UNLINK = 64 };
enum { KILL = -1, SHORT = -2 };

struct orders {
    _Atomic long armed, count; /* count: calls since armed */
    long nth, fault, calls;    /* fault: an errno, KILL or SHORT; calls: a mask */
    _Atomic long hit;          /* the call that it befell, or 0 */
    char below[2048];
};
static struct orders *orders;

__attribute__((constructor)) static void map_orders(void) {
    const char *path = getenv("DDB_FAILING_CALLS");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *page = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *orders, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page != MAP_FAILED) orders = page;
}

static int befalls(int call, const char *path, int fd) {
    char name[PATH_MAX] = "", link[64];
    if (!orders || !orders->armed || !(orders->calls & call)) return 0;
    if (!path || path[0] != '/') {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        if (readlink(link, name, sizeof name - 1) < 0) return 0;
        path = name;
    }
    if (strncmp(path, orders->below, strlen(orders->below)) || ++orders->count != orders->nth) return 0;
    orders->hit = call;
    if (orders->fault == KILL) kill(getpid(), SIGKILL), pause();
    if (orders->fault > 0) errno = (int)orders->fault;
    return 1;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define PATHS(name, call, parameters, arguments, path) \
    int name parameters { REAL(name); return befalls(call, path, -1) ? -1 : real arguments; }
#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        return befalls(OPEN, path, -1) ? -1 : real(path, flags, mode); }

OPENS(open)
OPENS(open64)
PATHS(rename, RENAME, (const char *from, const char *to), (from, to), to)
PATHS(link, LINK, (const char *from, const char *to), (from, to), to)
PATHS(unlink, UNLINK, (const char *path), (path), path)
int unlinkat(int fd, const char *path, int flags) { REAL(unlinkat); return befalls(UNLINK, path, fd) ? -1 : real(fd, path, flags); }
int fsync(int fd) { REAL(fsync); return befalls(FSYNC, NULL, fd) ? -1 : real(fd); }
int flock(int fd, int how) { REAL(flock); return befalls(FLOCK, NULL, fd) ? -1 : real(fd, how); }
ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (!befalls(WRITE, NULL, fd)) return real(fd, data, size);
    return orders->fault == SHORT ? real(fd, data, (size + 1) / 2) : -1;
}

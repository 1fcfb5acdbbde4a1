/* A disk that fails, for tests: preloaded into brokers, it answers writes and syncs of chosen files as told.
 *
 * FAULTY_DISK names a control file. Its lines are read again whenever it changes:
 *
 *     <call> <what> <count> <path part>
 *
 * call: write | sync      what: enospc | eio | short | delay=<milliseconds>      count: how often, -1 for ever
 * A line applies to files whose path contains the path part. The first that applies counts.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { RULES = 16 };
struct rule { char call[8]; char what[32]; long count; char part[256]; };

static struct rule rules[RULES];
static int rule_count;
static struct timespec seen;
static off_t seen_bytes = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void look(void) {
    const char *path = getenv("FAULTY_DISK");
    struct stat status;
    if (!path || stat(path, &status) != 0) return;
    if (status.st_mtim.tv_sec == seen.tv_sec && status.st_mtim.tv_nsec == seen.tv_nsec && status.st_size == seen_bytes)
        return;
    seen = status.st_mtim;
    seen_bytes = status.st_size;
    rule_count = 0;
    FILE *file = fopen(path, "r");
    if (!file) return;
    struct rule *rule = rules;
    while (rule_count < RULES
           && fscanf(file, "%7s %31s %ld %255s", rule->call, rule->what, &rule->count, rule->part) == 4) {
        rule_count++;
        rule++;
    }
    fclose(file);
}

/* What to do with this call: 0 nothing, -1 a short write, else the error number. Waits when it is told to. */
static int verdict(const char *call, int fd) {
    char link[64], path[4096];
    int result = 0;
    long delay = 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    pthread_mutex_lock(&lock);
    look();
    for (int i = 0; i < rule_count; i++) {
        struct rule *rule = &rules[i];
        if (strcmp(rule->call, call) || rule->count == 0 || !strstr(path, rule->part)) continue;
        if (rule->count > 0) rule->count--;
        if (!strcmp(rule->what, "enospc")) result = ENOSPC;
        else if (!strcmp(rule->what, "eio")) result = EIO;
        else if (!strcmp(rule->what, "short")) result = -1;
        else if (!strncmp(rule->what, "delay=", 6)) delay = atol(rule->what + 6);
        break;
    }
    pthread_mutex_unlock(&lock);
    if (delay) {
        struct timespec pause = {delay / 1000, delay % 1000 * 1000000};
        nanosleep(&pause, NULL);
    }
    return result;
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    static ssize_t (*real)(int, const struct iovec *, int, off_t);
    if (!real) real = (ssize_t(*)(int, const struct iovec *, int, off_t))dlsym(RTLD_NEXT, "pwritev");
    int what = verdict("write", fd);
    if (what > 0) { errno = what; return -1; }
    if (what < 0) {                     /* a torn record: its header, and half of its payload if it has one */
        struct iovec some[2] = {parts[0], parts[1]};
        some[some[1].iov_len ? 1 : 0].iov_len /= 2;
        return real(fd, some, 2, offset);
    }
    return real(fd, parts, count, offset);
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t offset) { return pwritev(fd, parts, count, offset); }

ssize_t write(int fd, const void *data, size_t bytes) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    if (bytes < 1024) return real(fd, data, bytes);     /* pipes and logs: never asked for, and often */
    int what = verdict("write", fd);
    if (what > 0) { errno = what; return -1; }
    return real(fd, data, what < 0 ? bytes / 2 : bytes);
}

static int sync_as(const char *name, int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    int what = verdict("sync", fd);
    if (what > 0) { errno = what; return -1; }
    return real(fd);
}

int fdatasync(int fd) { return sync_as("fdatasync", fd); }
int fsync(int fd) { return sync_as("fsync", fd); }

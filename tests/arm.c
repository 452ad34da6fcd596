// Runs functions of a library on memory that is sent to it: `test_arm.py` says what is sent.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <sys/mman.h>

typedef struct {
    char name[32];
    long arguments[21];  // all but floats, in their order: places in memory count from BASE
    double number;       // the float among them
    long bytes;          // of memory, which follows, and is sent back after the call
} Call;

typedef void (*Function)(long, long, long, long, long, long, long, long, long, long, long, long, long, long,
                         long, long, long, long, long, long, long, float);

int main(int count, char **arguments) {
    char *const base = (char *)(1L << 40);
    const long room = 1L << 30;
    void *library = count == 2 ? dlopen(arguments[1], RTLD_NOW) : 0;
    void *memory = mmap(base, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (!library || memory != base) return fprintf(stderr, "%s\n", library ? "no memory" : dlerror()), 1;
    Call call;
    while (fread(&call, sizeof call, 1, stdin) == 1) {
        const long *a = call.arguments;
        Function function = (Function)dlsym(library, call.name);
        if (!function || call.bytes > room) return fprintf(stderr, "%s: not here\n", call.name), 1;
        if (fread(base, 1, call.bytes, stdin) != (size_t)call.bytes) return 1;
        function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13],
                 a[14], a[15], a[16], a[17], a[18], a[19], a[20], (float)call.number);
        fwrite(base, 1, call.bytes, stdout);
        fflush(stdout);
    }
    return 0;
}

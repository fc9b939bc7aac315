/* A slower link: each copy between host and device takes at least bytes / rate, for every program.

   Preloaded, it stands before cudaMemcpyAsync. Around a copy it puts two operations on the same
   stream: one that writes "begun" to a word of host memory when the stream gets there, and one that
   waits for "over". A thread of the host sees the first, reserves the link for bytes / rate (one
   reservation after the other for each direction, whatever the streams are), and writes the second
   when that time has passed. No kernel runs, so nothing is taken from the model's compute, and who
   copies and how makes no difference: pinned or not, one stream or many, Python or C++.

   PACED_LINK_GBPS is the rate in 1e9 bytes a second. Copies below 256 KiB are not touched.

   cc -O2 -shared -fPIC -o paced_link.so paced_link.c -ldl -lpthread */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define SLOTS 16384u
#define LEAST_BYTES (256u * 1024u)
#ifndef BACK_TO_BACK_NS
#define BACK_TO_BACK_NS 30000 /* a copy that begins so soon after another lost only our own time */
#endif

enum { FREE, QUEUED, BEGUN };

typedef struct {
    _Atomic int state;
    uint32_t turn;
    int direction;
    uint64_t nanoseconds, over_at;
} Slot;

typedef int (*copy_function)(void *, const void *, size_t, int, void *);
typedef int (*stream_function)(void *, uint64_t, uint32_t, unsigned);

static copy_function real_copy;
static stream_function write_value, wait_value;
static double nanoseconds_a_byte;
static Slot slots[SLOTS];
static volatile uint32_t *begun, *over; /* pinned; the device reads and writes them */
static _Atomic uint64_t next_ticket;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void *pace(void *unused) {
    (void)unused;
    uint64_t oldest = 0, free_at[3] = {0, 0, 0};
    for (;;) {
        uint64_t end = atomic_load(&next_ticket);
        for (uint64_t ticket = oldest; ticket < end; ticket++) {
            Slot *slot = &slots[ticket % SLOTS];
            uint32_t at = (uint32_t)(ticket % SLOTS);
            int state = atomic_load_explicit(&slot->state, memory_order_acquire);
            if (state == QUEUED && begun[at] == slot->turn) {
                uint64_t t = now(), *link = &free_at[slot->direction];
                uint64_t from = t > *link + BACK_TO_BACK_NS ? t : *link;
                *link = slot->over_at = from + slot->nanoseconds;
                atomic_store(&slot->state, state = BEGUN);
            }
            if (state == BEGUN && now() >= slot->over_at) {
                over[at] = slot->turn;
                atomic_store_explicit(&slot->state, FREE, memory_order_release);
            }
            if (ticket == oldest && atomic_load(&slot->state) == FREE &&
                over[at] == (uint32_t)(ticket / SLOTS + 1))
                oldest++;
        }
    }
    return NULL;
}

static void *symbol(const char *library, const char *name) {
    void *handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    return handle ? dlsym(handle, name) : NULL;
}

static void *of_runtime(const char *name) {
    static const char *const libraries[] = {"libcudart.so.13", "libcudart.so.12", "libcudart.so"};
    for (unsigned i = 0; i < sizeof libraries / sizeof *libraries; i++) {
        void *found = symbol(libraries[i], name);
        if (found) return found;
    }
    return dlsym(RTLD_NEXT, name);
}

static void begin(void) {
    real_copy = (copy_function)of_runtime("cudaMemcpyAsync");
    const char *rate = getenv("PACED_LINK_GBPS");
    if (!rate || atof(rate) <= 0) return;
    int (*allocate)(void **, size_t, unsigned) =
        (int (*)(void **, size_t, unsigned))of_runtime("cudaHostAlloc");
    write_value = (stream_function)symbol("libcuda.so.1", "cuStreamWriteValue32_v2");
    wait_value = (stream_function)symbol("libcuda.so.1", "cuStreamWaitValue32_v2");
    void *words = NULL;
    pthread_t thread;
    if (!allocate || !write_value || !wait_value || allocate(&words, SLOTS * 8, 3) ||
        pthread_create(&thread, NULL, pace, NULL)) {
        fprintf(stderr, "paced link: cannot pace, copies run at full speed\n");
        return;
    }
    begun = words;
    over = begun + SLOTS;
    for (unsigned i = 0; i < SLOTS; i++) begun[i] = over[i] = 0;
    nanoseconds_a_byte = 1.0 / atof(rate);
    fprintf(stderr, "paced link: %s GB/s\n", rate);
}

int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    pthread_once(&once, begin);
    if (nanoseconds_a_byte <= 0 || bytes < LEAST_BYTES || (kind != 1 && kind != 2))
        return real_copy(to, from, bytes, kind, stream);
    uint64_t ticket = atomic_fetch_add(&next_ticket, 1);
    uint32_t at = (uint32_t)(ticket % SLOTS), turn = (uint32_t)(ticket / SLOTS + 1);
    Slot *slot = &slots[at];
    while (turn > 1 && over[at] != turn - 1) {} /* all slots are taken */
    while (atomic_load_explicit(&slot->state, memory_order_acquire) != FREE) {}
    slot->turn = turn;
    slot->direction = kind;
    slot->nanoseconds = (uint64_t)((double)bytes * nanoseconds_a_byte);
    atomic_store_explicit(&slot->state, QUEUED, memory_order_release);
    if (write_value(stream, (uint64_t)(uintptr_t)&begun[at], turn, 0)) begun[at] = turn;
    int result = real_copy(to, from, bytes, kind, stream);
    wait_value(stream, (uint64_t)(uintptr_t)&over[at], turn, 1);
    return result;
}

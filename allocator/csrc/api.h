// The C ABI of librotator_alloc. All bytes are the driver's bytes. Every call that can fail returns an RA_* code and,
// when `error` is not null, fills it: errors belong to the call that met them, nothing is kept between calls.
// Functions are safe to call from several threads; none calls back into its caller.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define RA_EXPORT extern "C" __attribute__((visibility("default")))

enum ra_code {
  RA_OK = 0,
  RA_DRIVER_MISSING = 1,
  RA_DRIVER_ERROR = 2,
  RA_OUT_OF_MEMORY = 3,
  RA_UNKNOWN_TAG = 4,
  RA_ALREADY_ASLEEP = 5,
  RA_NOT_ASLEEP = 6,
  RA_FOREIGN_POINTER = 7,
  RA_INVALID_SIZE = 8,
  RA_HOST_MEMORY = 9,
  RA_TAG_ASLEEP = 10,
  RA_CAPTURING = 11,
  RA_OUT_OF_ADDRESSES = 12,
  RA_ROLLBACK_FAILED = 13,
  RA_INTERNAL = 14,
};

enum ra_tag { RA_WEIGHTS = 0, RA_KV_CACHE = 1, RA_RUNTIME = 2, RA_WORKSPACE = 3, RA_CUDAGRAPH = 4, RA_TAGS = 5 };

struct ra_error {
  int32_t code;
  int32_t driver_code;
  uint64_t bytes_wanted;
  uint64_t bytes_free;
  char call[48];
  char message[256];
};

struct ra_config {
  uint64_t slab_bytes;         // size of one handle; rounded up to the device's granularity
  uint64_t host_budget_bytes;  // bound on masters, 0 for none
  uint32_t prefault_threads;
  uint32_t reserved;
};

struct ra_report {
  double seconds;
  double fence_seconds;
  double copy_seconds;
  double map_seconds;        // create, map and access on wake; unmap and release on sleep
  uint64_t bytes_device;     // returned to the device by a sleep, taken by a wake
  uint64_t bytes_copied;
  uint64_t bytes_unchanged;  // equal to their master by digest, so not copied
  uint64_t bytes_discarded;
  uint64_t bytes_held;       // unmapped, but the driver refused to take the handle back: see ra_collect
};

struct ra_usage {
  int32_t tag;
  int32_t device;
  int32_t asleep;
  int32_t segments;
  uint64_t bytes_allocated;  // live segments
  uint64_t bytes_mapped;     // device bytes held by handles
  uint64_t bytes_deferred;   // freed, waiting for their fence
  uint64_t bytes_masters;
};

struct ra_host_usage {
  uint64_t bytes_registered;
  uint64_t bytes_used;
  uint64_t bytes_budget;
};

typedef struct ra_allocator ra_allocator;

// The factor between shown and real bytes of a simulated driver; 1 and not simulated for any other.
RA_EXPORT int ra_scale(const char* driver_path, uint64_t* scale, int* simulated, ra_error* error);
RA_EXPORT int ra_open(const char* driver_path, const ra_config* config, ra_allocator** out, ra_error* error);
RA_EXPORT int ra_close(ra_allocator* allocator, ra_error* error);
RA_EXPORT int ra_alloc(ra_allocator* allocator, size_t nbytes, int device, int tag, uint64_t* address, ra_error* error);
RA_EXPORT int ra_free(ra_allocator* allocator, uint64_t address, void* stream, ra_error* error);
RA_EXPORT int ra_write(ra_allocator* allocator, uint64_t address, size_t offset, const void* data, size_t nbytes,
                       ra_error* error);
RA_EXPORT int ra_read(ra_allocator* allocator, uint64_t address, size_t offset, void* data, size_t nbytes,
                      ra_error* error);
// `tags` and `offload` are bit masks over ra_tag. Tags in `tags` and not in `offload` are discarded. `strict`: every
// tag named must be awake (asleep, for a wake); otherwise those that are, and at least one must be.
RA_EXPORT int ra_sleep(ra_allocator* allocator, uint32_t tags, uint32_t offload, int strict, ra_report* report,
                       ra_error* error);
RA_EXPORT int ra_wake(ra_allocator* allocator, uint32_t tags, int strict, ra_report* report, ra_error* error);
// Takes masters of awake segments now, so that a later sleep of unchanged segments copies nothing.
RA_EXPORT int ra_prepare(ra_allocator* allocator, uint32_t tags, ra_report* report, ra_error* error);
// Gives back the masters of awake tags. Never touches a tag that is asleep.
RA_EXPORT int ra_release_masters(ra_allocator* allocator, uint32_t tags, uint64_t* nbytes, ra_error* error);
// Waits for the fences of freed segments, returns what is wholly free, and retries handles the driver refused.
RA_EXPORT int ra_collect(ra_allocator* allocator, uint64_t* nbytes, ra_error* error);
// Brackets a graph capture anywhere in the process: while one runs, frees queue without a fence.
RA_EXPORT int ra_capture(ra_allocator* allocator, int begin, ra_error* error);
RA_EXPORT int ra_asleep_tags(ra_allocator* allocator, uint32_t* tags);
// Fills at most `capacity` rows and stores how many there are.
RA_EXPORT int ra_memory_usage(ra_allocator* allocator, ra_usage* rows, size_t capacity, size_t* count);
RA_EXPORT int ra_host_memory(ra_allocator* allocator, ra_host_usage* usage);
// What the driver says of a whole device, all processes together.
RA_EXPORT int ra_device_memory(ra_allocator* allocator, int device, uint64_t* free, uint64_t* total, ra_error* error);

// torch's pluggable allocator. Its functions serve the one allocator given to ra_torch_bind (another one is refused with
// RA_INTERNAL until the first is closed): each under its own tag, rotator_malloc under the calling thread's.
RA_EXPORT int ra_torch_bind(ra_allocator* allocator);
RA_EXPORT int ra_torch_tag(int tag);
RA_EXPORT void* rotator_malloc(ssize_t nbytes, int device, void* stream);
RA_EXPORT void* rotator_malloc_weights(ssize_t nbytes, int device, void* stream);
RA_EXPORT void* rotator_malloc_kv_cache(ssize_t nbytes, int device, void* stream);
RA_EXPORT void* rotator_malloc_kv_cache_mixed(ssize_t nbytes, int device, void* stream);  // small segments are runtime
RA_EXPORT void* rotator_malloc_runtime(ssize_t nbytes, int device, void* stream);
RA_EXPORT void* rotator_malloc_workspace(ssize_t nbytes, int device, void* stream);
RA_EXPORT void* rotator_malloc_cudagraph(ssize_t nbytes, int device, void* stream);
RA_EXPORT void rotator_free(void* address, ssize_t nbytes, int device, void* stream);

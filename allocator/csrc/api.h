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
  RA_REGISTERED = 15,   // memory registered for IPC or RDMA: release it first
  RA_MASTER_LOST = 16,  // a master on disk does not read back as it was written
  RA_BUDGET_FILE = 17,  // the shared budget's file is absent, cannot be written, or is no budget
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
  uint64_t slab_bytes;         // largest handle; rounded up to the device's granularity
  uint64_t host_budget_bytes;  // bound on masters, 0 for none
  uint64_t chunk_bytes;        // what masters are compared and copied by; rounded up to 64 KiB on a GPU
  uint32_t prefault_threads;
  uint32_t use_digest;         // 0: every sleep copies
  uint32_t link_share_permille;  // how much of the link a prepare in the background may take
  uint32_t use_packing;          // 0: masters are copied as they are
  const char* spill_directory;   // null or empty: none
  const char* budget_file;       // null or empty: the budget is this allocator's alone
};

struct ra_report {
  double seconds;
  double fence_seconds;
  double digest_seconds;
  double host_seconds;       // room for masters: mapping, prefaulting, registering
  double copy_seconds;
  double map_seconds;        // create, map and access on wake; unmap on sleep
  double release_seconds;
  uint64_t bytes_device;     // returned to the device by a sleep, taken by a wake
  uint64_t bytes_copied;
  uint64_t bytes_spilled;    // of these, to disk or from it
  uint64_t bytes_unchanged;  // equal to their master by digest, so not copied
  uint64_t bytes_discarded;
  uint64_t bytes_kept;       // asleep, and still on the device: not wanted back yet
  uint64_t bytes_held;       // unmapped, but the driver refused to take the handle back: see ra_collect
};

struct ra_usage {
  int32_t tag;               // RA_TAGS: memory of our own for the time of an operation
  int32_t device;
  int32_t asleep;
  int32_t segments;
  uint64_t bytes_allocated;  // live segments
  uint64_t bytes_mapped;     // device bytes held by handles
  uint64_t bytes_peak;       // the most that was ever held
  uint64_t bytes_deferred;   // freed, waiting for their fence or for their registration to end
  uint64_t bytes_masters;    // in host memory
  uint64_t bytes_spilled;    // masters on disk
};

struct ra_host_usage {
  uint64_t bytes_registered;
  uint64_t bytes_used;
  uint64_t bytes_budget;       // 0: none
  uint64_t bytes_shared_used;  // by all processes that share the budget
  uint64_t bytes_limit;        // that could be registered in all, as things are now
  uint64_t bytes_spilled;
};

struct ra_prepare_state {
  int32_t running;
  int32_t code;           // RA_OK, or why the last one ended early
  uint64_t bytes_done;
  uint64_t bytes_total;
  double seconds;
  char message[256];
};

// What this machine lets a process pin, in real bytes. UINT64_MAX: no limit, or none that can be read.
typedef struct ra_host_limits_t {
  uint64_t memlock_soft;
  uint64_t memlock_hard;
  uint64_t cgroup_limit;  // of the control group with the least room: the smaller of its hard and its high limit
  uint64_t cgroup_current;
  uint64_t cgroup_reclaimable;  // page cache in cgroup_current
  uint64_t mem_total;
  uint64_t mem_available;
  uint64_t bytes_room;       // what can be touched now, by control group and free memory
  uint64_t huge_page_bytes;  // 0: unknown
  int32_t cap_ipc_lock;      // 1: memlock does not count
  int32_t cgroup_version;    // 0: none
  int32_t huge_pages;        // transparent ones: 0 never, 1 madvise, 2 always, -1 unknown
  int32_t numa_nodes;        // with memory
  char cgroup_path[256];
} ra_host_limits_t;

typedef struct ra_allocator ra_allocator;

RA_EXPORT int ra_host_limits(ra_host_limits_t* limits);
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
// `bytes_wanted` 0: everything goes. Else only so much on each device goes, what is cheapest to restore first; the rest
// stays on the device, asleep, and a later sleep can go on.
RA_EXPORT int ra_sleep(ra_allocator* allocator, uint32_t tags, uint32_t offload, int strict, uint64_t bytes_wanted,
                       ra_report* report, ra_error* error);
RA_EXPORT int ra_wake(ra_allocator* allocator, uint32_t tags, int strict, ra_report* report, ra_error* error);
// Takes masters of awake segments now, so that a later sleep of unchanged segments copies nothing.
RA_EXPORT int ra_prepare(ra_allocator* allocator, uint32_t tags, ra_report* report, ra_error* error);
// The same in the background, chunk by chunk through a staging buffer, while kernels run. Returns at once.
RA_EXPORT int ra_prepare_start(ra_allocator* allocator, uint32_t tags, ra_error* error);
RA_EXPORT int ra_prepare_status(ra_allocator* allocator, ra_prepare_state* state);
// Memory at this address, anywhere in a segment, is registered for IPC or RDMA: until it is unpinned as often, it is
// neither slept nor, when freed, unmapped.
RA_EXPORT int ra_pin(ra_allocator* allocator, uint64_t address, ra_error* error);
RA_EXPORT int ra_unpin(ra_allocator* allocator, uint64_t address, ra_error* error);
// Where masters go from now on: 0 host memory, 1 the spill directory. Those in host memory are moved to disk now, of
// sleeping tags too; those on disk come back to host memory when they are taken again.
RA_EXPORT int ra_place_masters(ra_allocator* allocator, int on_disk, uint64_t* bytes_moved, ra_error* error);
// Bounds what is registered from now on; masters that there are stay. 0: no bound.
RA_EXPORT int ra_set_host_budget(ra_allocator* allocator, uint64_t nbytes, ra_error* error);
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

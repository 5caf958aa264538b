// torch's pluggable allocator. torch passes no context to it, so the allocator that it serves is bound here; and one
// pool serves one tag, so each tag has its own function: what a thread does elsewhere cannot change a segment's tag.
#include "csrc/torch.h"

#include <atomic>
#include <cstdio>

static std::atomic<ra_allocator*> bound{nullptr};

int ra_torch_bind(ra_allocator* allocator) {
  ra_allocator* none = nullptr;
  return bound.compare_exchange_strong(none, allocator) || none == allocator ? RA_OK : RA_INTERNAL;
}

void rotator::torch_unbind(ra_allocator* allocator) { bound.compare_exchange_strong(allocator, nullptr); }

// Null makes torch raise its own out-of-memory error, which cannot carry ours, so ours is written down.
static void* allocate(ssize_t nbytes, int device, int tag) {
  ra_allocator* allocator = bound;
  if (allocator == nullptr || nbytes <= 0) return nullptr;
  uint64_t address = 0;
  ra_error error{};
  if (ra_alloc(allocator, static_cast<size_t>(nbytes), device, tag, &address, &error) == RA_OK)
    return reinterpret_cast<void*>(address);
  std::fprintf(stderr, "rotator: %zd bytes on device %d refused: %s (bytes wanted %llu, bytes free %llu)\n", nbytes,
               device, error.message, static_cast<unsigned long long>(error.bytes_wanted),
               static_cast<unsigned long long>(error.bytes_free));
  return nullptr;
}

// The tag of rotator_malloc is the calling thread's, for callers that plug one function in.
static thread_local int thread_tag = RA_WEIGHTS;

int ra_torch_tag(int tag) {
  const int before = thread_tag;
  thread_tag = tag;
  return before;
}

void* rotator_malloc(ssize_t nbytes, int device, void*) { return allocate(nbytes, device, thread_tag); }
void* rotator_malloc_weights(ssize_t nbytes, int device, void*) { return allocate(nbytes, device, RA_WEIGHTS); }
void* rotator_malloc_kv_cache(ssize_t nbytes, int device, void*) { return allocate(nbytes, device, RA_KV_CACHE); }
void* rotator_malloc_runtime(ssize_t nbytes, int device, void*) { return allocate(nbytes, device, RA_RUNTIME); }
void* rotator_malloc_workspace(ssize_t nbytes, int device, void*) { return allocate(nbytes, device, RA_WORKSPACE); }
void* rotator_malloc_cudagraph(ssize_t nbytes, int device, void*) { return allocate(nbytes, device, RA_CUDAGRAPH); }

// For regions that hold a cache and what goes with it. torch packs tensors of up to 10 MiB into segments of 2 and 20 MiB,
// so what is larger is the cache, to be discarded, and the rest is kept.
static constexpr ssize_t kPackedBytes = 20 << 20;
void* rotator_malloc_kv_cache_mixed(ssize_t nbytes, int device, void*) {
  return allocate(nbytes, device, nbytes <= kPackedBytes ? RA_RUNTIME : RA_KV_CACHE);
}

void rotator_free(void* address, ssize_t, int, void* stream) {
  ra_allocator* allocator = bound;
  if (allocator == nullptr || address == nullptr) return;
  ra_error error{};
  if (ra_free(allocator, reinterpret_cast<uint64_t>(address), stream, &error) != RA_OK)
    std::fprintf(stderr, "rotator: free of %p refused: %s\n", address, error.message);
}

// Memory as programs without virtual memory management take it: an engine with the stock allocator, and the self-test
// where it measures what such an engine would need.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "sim/sim.h"

using namespace sim;

namespace sim {

static CUresult synchronize(Lock& lock, int device) {
  const auto& streams = sim().streams;
  return wait_for(lock, [&] {
    return std::all_of(streams.begin(), streams.end(),
                       [&](CUstream stream) { return stream->device != device || stream->ops.empty(); });
  });
}

static CUresult take_plain(std::size_t nbytes, CUdeviceptr& address) {
  CUmemGenericAllocationHandle handle = 0;
  if (const CUresult result = create_memory(current()->device, nbytes, true, handle)) return result;
  void* found = mmap(nullptr, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  address = reinterpret_cast<CUdeviceptr>(found);
  const CUresult result = found == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : map_memory(address, handle);
  release_memory(handle);  // its mapping keeps it
  if (result == CUDA_SUCCESS) open_memory({address});
  return result;
}

}  // namespace sim

SIM_EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* address, std::size_t nbytes) {
  SIM_CALL("cuMemAlloc");
  SIM_CHECK(current() != nullptr, CUDA_ERROR_INVALID_CONTEXT);
  SIM_CHECK(nbytes != 0, CUDA_ERROR_INVALID_VALUE);
  if (const CUresult broken = break_captures()) return broken;
  const std::size_t size = rotator::round_up(nbytes, granularity());
  const CUresult result = take_plain(size, *address);
  if (result == CUDA_SUCCESS) s.plain.emplace(*address, size);
  return result;
}

// Waits for the whole device first, as the driver does.
SIM_EXPORT CUresult cuMemFree_v2(CUdeviceptr address) {
  SIM_CALL("cuMemFree");
  const auto found = s.plain.find(address);
  SIM_CHECK(found != s.plain.end() && current() != nullptr, CUDA_ERROR_INVALID_VALUE);
  if (const CUresult broken = break_captures()) return broken;
  if (const CUresult result = synchronize(lock, current()->device)) return result;
  unmap_memory(address);
  munmap(reinterpret_cast<void*>(address), found->second);
  s.plain.erase(found);
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuMemHostAlloc(void** data, std::size_t nbytes, unsigned) {
  SIM_CALL("cuMemHostAlloc");
  SIM_CHECK(current() != nullptr, CUDA_ERROR_INVALID_CONTEXT);
  SIM_CHECK(nbytes != 0, CUDA_ERROR_INVALID_VALUE);
  const bool integrated = s.box->config().integrated;
  SIM_CHECK(!integrated || s.box->take(current()->device, nbytes), CUDA_ERROR_OUT_OF_MEMORY);
  void* found = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (found == MAP_FAILED) {
    if (integrated) s.box->give(current()->device, nbytes);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  *data = found;
  s.registered.emplace(static_cast<const char*>(found), nbytes);
  s.pinned.emplace(found, nbytes);
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuMemFreeHost(void* data) {
  SIM_CALL("cuMemFreeHost");
  const auto found = s.pinned.find(data);
  SIM_CHECK(found != s.pinned.end() && current() != nullptr, CUDA_ERROR_INVALID_VALUE);
  if (const CUresult result = synchronize(lock, current()->device)) return result;
  if (s.box->config().integrated) s.box->give(current()->device, found->second);
  munmap(data, found->second);
  s.registered.erase(static_cast<const char*>(data));
  s.pinned.erase(found);
  return CUDA_SUCCESS;
}

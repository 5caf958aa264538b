// Virtual memory over host memory. A reservation is address space without access; a handle is a range of the device's
// memory file; mapping puts the file's pages there; access opens them. Touching anything else faults, as it should.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "sim/sim.h"

namespace sim {

// 2 MiB as shown, as far down as the host's pages let it scale.
std::size_t granularity() {
  constexpr std::size_t kShown = 2u << 20, kPage = 4096;
  return std::max<std::size_t>(kPage, rotator::round_up(kShown / sim().box->config().scale, kPage));
}

// Every byte lies in a mapping with access; neighbours count as one.
bool accessible(CUdeviceptr address, std::size_t nbytes) {
  const Sim& s = sim();
  const CUdeviceptr end = address + nbytes;
  while (address < end) {
    auto it = s.mappings.upper_bound(address);
    if (it == s.mappings.begin()) return false;
    --it;
    if (address >= it->first + it->second.nbytes || !it->second.access) return false;
    address = it->first + it->second.nbytes;
  }
  return true;
}

static void* at(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

static Physical& physical(int device) {
  Sim& s = sim();
  Physical& memory = s.physical[device];
  if (memory.fd >= 0) return memory;
  memory.fd = memfd_create("simulated-gpu", MFD_CLOEXEC);
  if (ftruncate(memory.fd, static_cast<off_t>(s.box->device_bytes())) != 0) close(std::exchange(memory.fd, -1));
  memory.ranges = rotator::Ranges(s.box->device_bytes());
  return memory;
}

// Fresh pages hold garbage on a GPU; all ones read as NaN, so whoever relies on zeros is found out.
static void fill_with_garbage(int fd, std::size_t offset, std::size_t nbytes) {
  static const auto garbage = [] {
    std::array<unsigned char, 1 << 16> block;
    block.fill(0xFF);
    return block;
  }();
  for (std::size_t done = 0; done < nbytes;) {
    const ssize_t written = pwrite(fd, garbage.data(), std::min(garbage.size(), nbytes - done),
                                   static_cast<off_t>(offset + done));
    if (written <= 0) return;
    done += static_cast<std::size_t>(written);
  }
}

static void forget_when_unused(CUmemGenericAllocationHandle name) {
  Sim& s = sim();
  const Handle handle = s.handles.at(name);
  if (!handle.released || handle.mappings != 0) return;
  Physical& memory = physical(handle.device);
  fallocate(memory.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(handle.offset),
            static_cast<off_t>(handle.nbytes));
  memory.ranges.give(handle.offset, handle.nbytes);
  engine_clears(handle.device, handle.nbytes);
  s.box->give(handle.device, handle.nbytes);
  s.handles.erase(name);
}

static bool reserved(CUdeviceptr address, std::size_t nbytes) {
  const Sim& s = sim();
  auto it = s.reservations.upper_bound(address);
  if (it == s.reservations.begin()) return false;
  --it;
  return address + nbytes <= it->first + it->second;
}

static bool overlaps_mapping(CUdeviceptr address, std::size_t nbytes) {
  const Sim& s = sim();
  auto it = s.mappings.lower_bound(address + nbytes);
  if (it == s.mappings.begin()) return false;
  --it;
  return it->first + it->second.nbytes > address;
}

CUresult create_memory(int device, std::size_t nbytes, bool rdma, CUmemGenericAllocationHandle& handle) {
  Sim& s = sim();
  SIM_CHECK(s.box->take(device, nbytes), CUDA_ERROR_OUT_OF_MEMORY);
  Physical& memory = physical(device);
  const auto offset = memory.ranges.take(nbytes);
  if (!offset || memory.fd < 0) {
    s.box->give(device, nbytes);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  fill_with_garbage(memory.fd, *offset, nbytes);
  handle = s.next_handle++;
  s.handles.emplace(handle, Handle{device, *offset, nbytes, rdma});
  return CUDA_SUCCESS;
}

void release_memory(CUmemGenericAllocationHandle handle) {
  sim().handles.at(handle).released = true;
  forget_when_unused(handle);
}

CUresult map_memory(CUdeviceptr address, CUmemGenericAllocationHandle name) {
  Handle& handle = sim().handles.at(name);
  void* mapped = mmap(at(address), handle.nbytes, PROT_NONE, MAP_SHARED | MAP_FIXED, physical(handle.device).fd,
                      static_cast<off_t>(handle.offset));
  SIM_CHECK(mapped != MAP_FAILED, CUDA_ERROR_OUT_OF_MEMORY);
  ++handle.mappings;
  sim().mappings.emplace(address, MappedRange{handle.nbytes, name, false});
  return CUDA_SUCCESS;
}

void unmap_memory(CUdeviceptr start) {
  Sim& s = sim();
  const MappedRange range = s.mappings.at(start);
  mmap(at(start), range.nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  s.mappings.erase(start);
  --s.handles.at(range.handle).mappings;
  forget_when_unused(range.handle);
}

void open_memory(const std::vector<CUdeviceptr>& whole) {
  for (const CUdeviceptr start : whole) {
    MappedRange& range = sim().mappings.at(start);
    mprotect(at(start), range.nbytes, PROT_READ | PROT_WRITE);
    range.access = true;
  }
}

// The mappings that make up exactly this range; empty when it cuts one or leaves a gap.
static std::vector<CUdeviceptr> whole_mappings(CUdeviceptr address, std::size_t nbytes) {
  std::vector<CUdeviceptr> whole;
  CUdeviceptr next = address;
  while (next < address + nbytes) {
    const auto it = sim().mappings.find(next);
    if (it == sim().mappings.end()) return {};
    whole.push_back(next);
    next += it->second.nbytes;
  }
  return next == address + nbytes ? whole : std::vector<CUdeviceptr>{};
}

}  // namespace sim

using namespace sim;

SIM_EXPORT CUresult cuMemGetAllocationGranularity(std::size_t* value, const CUmemAllocationProp*, int) {
  SIM_CALL("cuMemGetAllocationGranularity");
  *value = granularity();
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuMemAddressReserve(CUdeviceptr* address, std::size_t nbytes, std::size_t, CUdeviceptr,
                                        unsigned long long) {
  SIM_CALL("cuMemAddressReserve");
  SIM_CHECK(nbytes != 0 && nbytes % granularity() == 0, CUDA_ERROR_INVALID_VALUE);
  void* found = mmap(nullptr, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  SIM_CHECK(found != MAP_FAILED, CUDA_ERROR_OUT_OF_MEMORY);
  *address = reinterpret_cast<CUdeviceptr>(found);
  s.reservations.emplace(*address, nbytes);
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuMemAddressFree(CUdeviceptr address, std::size_t nbytes) {
  SIM_CALL("cuMemAddressFree");
  const auto found = s.reservations.find(address);
  SIM_CHECK(found != s.reservations.end() && found->second == nbytes, CUDA_ERROR_INVALID_VALUE);
  SIM_CHECK(!overlaps_mapping(address, nbytes), CUDA_ERROR_INVALID_VALUE);
  munmap(at(address), nbytes);
  s.reservations.erase(found);
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, std::size_t nbytes,
                                const CUmemAllocationProp* prop, unsigned long long) {
  SIM_CALL("cuMemCreate");
  SIM_CHECK(nbytes != 0 && nbytes % granularity() == 0, CUDA_ERROR_INVALID_VALUE);
  SIM_CHECK(prop->type == CU_MEM_ALLOCATION_TYPE_PINNED && prop->location.type == CU_MEM_LOCATION_TYPE_DEVICE,
            CUDA_ERROR_INVALID_VALUE);
  SIM_CHECK(prop->location.id >= 0 && prop->location.id < static_cast<int>(s.visible.size()),
            CUDA_ERROR_INVALID_DEVICE);
  return create_memory(s.visible[prop->location.id], nbytes, prop->allocFlags.gpuDirectRDMACapable != 0, *handle);
}

SIM_EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  SIM_CALL("cuMemRelease");
  const auto found = s.handles.find(handle);
  SIM_CHECK(found != s.handles.end() && !found->second.released, CUDA_ERROR_INVALID_VALUE);
  release_memory(handle);
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuMemMap(CUdeviceptr address, std::size_t nbytes, std::size_t offset,
                             CUmemGenericAllocationHandle handle, unsigned long long) {
  SIM_CALL("cuMemMap");
  const auto found = s.handles.find(handle);
  SIM_CHECK(found != s.handles.end() && !found->second.released, CUDA_ERROR_INVALID_VALUE);
  SIM_CHECK(offset == 0 && nbytes == found->second.nbytes, CUDA_ERROR_INVALID_VALUE);
  SIM_CHECK(address % granularity() == 0 && reserved(address, nbytes), CUDA_ERROR_INVALID_VALUE);
  SIM_CHECK(!overlaps_mapping(address, nbytes), CUDA_ERROR_INVALID_VALUE);
  return map_memory(address, handle);
}

SIM_EXPORT CUresult cuMemSetAccess(CUdeviceptr address, std::size_t nbytes, const CUmemAccessDesc* access,
                                   std::size_t count) {
  SIM_CALL("cuMemSetAccess");
  SIM_CHECK(count == 1 && access->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE, CUDA_ERROR_INVALID_VALUE);
  const auto whole = whole_mappings(address, nbytes);
  SIM_CHECK(!whole.empty(), CUDA_ERROR_INVALID_VALUE);
  open_memory(whole);
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuMemUnmap(CUdeviceptr address, std::size_t nbytes) {
  SIM_CALL("cuMemUnmap");
  const auto whole = whole_mappings(address, nbytes);
  SIM_CHECK(!whole.empty(), CUDA_ERROR_INVALID_VALUE);
  // What is running there meets unmapped memory now; what is queued finds out when its turn comes.
  pump();
  if (running_on(address, nbytes)) s.sticky = CUDA_ERROR_ILLEGAL_ADDRESS;
  for (const CUdeviceptr start : whole) unmap_memory(start);
  return CUDA_SUCCESS;
}

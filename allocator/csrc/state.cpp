#include "csrc/state.h"

#include <string>

#include "csrc/error.h"

namespace rotator {

State::State(Driver driver, const ra_config& config)
    : driver_(driver),
      config_(config),
      arena_({config.host_budget_bytes, config.prefault_threads, std::size_t{1} << 30, {}, {}}) {}

State::~State() {
  // Kernels may still run on what goes away now.
  for (auto& [index, on] : devices_) {
    if (!on) continue;
    QuietContext scope(*on);
    driver_.CtxSynchronize();
  }
}

Device& State::device(int index) {
  auto& slot = devices_[index];
  if (!slot) slot = std::make_unique<Device>(driver_, index);
  return *slot;
}

Pool& State::pool(int tag, int index) {
  if (tag < 0 || tag >= RA_TAGS) raise(RA_UNKNOWN_TAG, "unknown tag " + std::to_string(tag));
  auto& slot = pools_[{tag, index}];
  if (!slot) {
    Device& on = device(index);
    ContextScope scope(on);
    slot = std::make_unique<Pool>(on, tag, round_up(config_.slab_bytes, on.granularity));
  }
  return *slot;
}

std::vector<Pool*> State::pools_of(uint32_t tags) {
  std::vector<Pool*> found;
  for (auto& [key, pool] : pools_)
    if (pool && (tags & bit(key.first)) != 0) found.push_back(pool.get());
  return found;
}

Segment& State::find(CUdeviceptr address) {
  const auto it = segments_.find(address);
  if (it == segments_.end()) raise(RA_FOREIGN_POINTER, "no live segment of this allocator starts at this address");
  return it->second;
}

bool State::is_capturing(CUstream stream) const {
  int status = CU_STREAM_CAPTURE_STATUS_NONE;
  return driver_.StreamIsCapturing(stream, &status) == CUDA_SUCCESS && status != CU_STREAM_CAPTURE_STATUS_NONE;
}

bool State::capturing() {
  for (auto it = capturing_streams_.begin(); it != capturing_streams_.end();)
    it = is_capturing(*it) ? std::next(it) : capturing_streams_.erase(it);
  return captures_ != 0 || !capturing_streams_.empty();
}

void State::capture(bool begin) {
  if (!begin && captures_ == 0) raise(RA_INTERNAL, "a capture ended that never began");
  captures_ += begin ? 1 : -1;
}

std::size_t State::take_range(Pool& target, std::size_t size) {
  try {
    return target.take(size);
  } catch (const Error& error) {
    if (error.code != RA_OUT_OF_MEMORY || capturing()) throw;
  }
  collect();
  try {
    return target.take(size);
  } catch (Error& error) {
    error.bytes_wanted = size;
    error.bytes_free = target.device.bytes_free();
    throw;
  }
}

CUdeviceptr State::alloc(std::size_t nbytes, int index, int tag) {
  if (nbytes == 0) raise(RA_INVALID_SIZE, "a segment needs at least one byte");
  Pool& target = pool(tag, index);
  if (asleep(target)) raise(RA_TAG_ASLEEP, "the tag is asleep: wake it before allocating under it");
  if (nbytes > target.device.total_bytes) raise(RA_INVALID_SIZE, "the segment is larger than its device");
  ContextScope scope(target.device);
  freed_.poll(capturing());
  const std::size_t size = round_up(nbytes, target.device.granularity);
  const std::size_t offset = take_range(target, size);
  const CUdeviceptr address = target.address(offset);
  segments_.emplace(address, Segment{&target, offset, nbytes, size, std::nullopt});
  return address;
}

void State::free(CUdeviceptr address, CUstream stream) {
  Segment& segment = find(address);
  Pool& owner = *segment.pool;
  drop_master(segment);
  if (asleep(owner)) {
    // Nothing is mapped, so nothing waits: the address alone goes back.
    owner.give(segment.offset, segment.size);
  } else {
    if (stream != nullptr && is_capturing(stream)) capturing_streams_.insert(stream);
    const bool captured = capturing();
    freed_.push(owner, segment.offset, segment.size, captured);
    freed_.poll(captured);
  }
  segments_.erase(address);
  release_unused();
}

void State::drop_master(Segment& segment) {
  if (segment.master) arena_.give(segment.master->block);
  segment.master.reset();
}

uint64_t State::release_unused() {
  uint64_t released = 0;
  for (auto& [key, pool] : pools_) {
    if (!pool) continue;
    QuietContext scope(pool->device);
    released += pool->release_unused(asleep(*pool));
  }
  return released;
}

uint64_t State::collect() {
  freed_.drain(capturing());
  return release_unused();
}

uint64_t State::release_masters(uint32_t tags) {
  const uint64_t before = arena_.bytes_registered();
  for (auto& [address, segment] : segments_)
    if ((tags & bit(segment.pool->tag)) != 0 && !asleep(*segment.pool)) drop_master(segment);
  arena_.trim();
  return before - arena_.bytes_registered();
}

Segment& State::accessible(CUdeviceptr address, std::size_t offset, std::size_t nbytes) {
  Segment& segment = find(address);
  if (asleep(*segment.pool)) raise(RA_TAG_ASLEEP, "the segment is asleep: wake its tag first");
  if (offset > segment.nbytes || nbytes > segment.nbytes - offset)
    raise(RA_INVALID_SIZE, "the copy reaches past the end of the segment");
  return segment;
}

void State::write(CUdeviceptr address, std::size_t offset, const void* data, std::size_t nbytes) {
  Device& on = accessible(address, offset, nbytes).pool->device;
  ContextScope scope(on);
  if (nbytes != 0) RA_TRY(driver_, MemcpyHtoDAsync, address + offset, data, nbytes, on.stream);
  RA_TRY(driver_, StreamSynchronize, on.stream);
}

void State::read(CUdeviceptr address, std::size_t offset, void* data, std::size_t nbytes) {
  Device& on = accessible(address, offset, nbytes).pool->device;
  ContextScope scope(on);
  if (nbytes != 0) RA_TRY(driver_, MemcpyDtoHAsync, data, address + offset, nbytes, on.stream);
  RA_TRY(driver_, StreamSynchronize, on.stream);
}

std::vector<ra_usage> State::usage() const {
  std::map<const Pool*, ra_usage> rows;
  for (const auto& [key, pool] : pools_) {
    if (!pool) continue;
    ra_usage row{key.first, key.second, asleep(*pool), 0, 0, pool->bytes_mapped(), pool->bytes_deferred, 0};
    rows.emplace(pool.get(), row);
  }
  for (const auto& [address, segment] : segments_) {
    ra_usage& row = rows.at(segment.pool);
    row.segments += 1;
    row.bytes_allocated += segment.nbytes;
    if (segment.master) row.bytes_masters += segment.master->block.nbytes;
  }
  std::vector<ra_usage> all;
  for (const auto& [pool, row] : rows) all.push_back(row);
  return all;
}

void State::device_memory(int index, uint64_t& free, uint64_t& total) {
  ContextScope scope(device(index));
  std::size_t free_bytes = 0, total_bytes = 0;
  RA_TRY(driver_, MemGetInfo, &free_bytes, &total_bytes);
  free = free_bytes;
  total = total_bytes;
}

ra_host_usage State::host_usage() const {
  return {arena_.bytes_registered(), arena_.bytes_used(), config_.host_budget_bytes};
}

}  // namespace rotator

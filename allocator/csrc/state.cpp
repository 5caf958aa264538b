#include "csrc/state.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "csrc/error.h"

namespace rotator {

// The digest kernel's tiles may not straddle chunks; the simulated driver's chunks are as small as its devices.
static std::size_t chunk_bytes(const ra_config& config, const Driver& driver) {
  const std::size_t unit = driver.SimScale != nullptr ? 4096 : 64u << 10;
  return round_up(std::max<std::size_t>(config.chunk_bytes, 1), unit);
}

static MasterOptions master_options(const ra_config& config, const Driver& driver) {
  MasterOptions options;
  options.chunk_bytes = chunk_bytes(config, driver);
  options.use_digest = config.use_digest != 0;
  options.use_packing = config.use_packing != 0;
  options.host.budget_bytes = config.host_budget_bytes;
  options.host.prefault_threads = config.prefault_threads;
  // What one step of a prepare in the background registers: the engine's own driver calls wait for it.
  options.host.extent_bytes = 2 * options.chunk_bytes;
  if (config.budget_file != nullptr) options.host.shared_budget_path = config.budget_file;
  if (config.spill_directory != nullptr) options.spill_directory = config.spill_directory;
  return options;
}

State::State(Driver driver, const ra_config& config)
    : driver_(driver), config_(config), masters_(driver_, master_options(config, driver_)) {}

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

Pool& State::open_pool(int tag, Device& on, std::size_t slab_bytes) {
  auto& slot = pools_[{tag, on.index}];
  if (!slot) {
    ContextScope scope(on);
    slot = std::make_unique<Pool>(on, tag, round_up(slab_bytes, on.granularity));
  }
  return *slot;
}

Pool& State::pool(int tag, int index) {
  if (tag < 0 || tag >= RA_TAGS) raise(RA_UNKNOWN_TAG, "unknown tag " + std::to_string(tag));
  return open_pool(tag, device(index), config_.slab_bytes);
}

Pool& State::staging(Device& on) { return open_pool(kStaging, on, config_.slab_bytes); }

std::vector<Pool*> State::pools_of(uint32_t tags) {
  std::vector<Pool*> found;
  for (auto& [key, pool] : pools_)
    if (pool && key.first < RA_TAGS && (tags & bit(key.first)) != 0) found.push_back(pool.get());
  return found;
}

Segment& State::find(CUdeviceptr address) {
  const auto it = segments_.find(address);
  if (it == segments_.end() || it->second.freed)
    raise(RA_FOREIGN_POINTER, "no live segment of this allocator starts at this address");
  return it->second;
}

Segment& State::find_around(CUdeviceptr address) {
  auto it = segments_.upper_bound(address);
  if (it != segments_.begin() && address < std::prev(it)->first + std::prev(it)->second.nbytes)
    return std::prev(it)->second;
  raise(RA_FOREIGN_POINTER, "this address lies in no segment of this allocator");
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
  segments_.emplace(address, Segment{&target, offset, nbytes, size, next_id_++, 0, false, {}});
  return address;
}

void State::free(CUdeviceptr address, CUstream stream) {
  Segment& segment = find(address);
  masters_.drop(segment);
  if (stream != nullptr && is_capturing(stream)) capturing_streams_.insert(stream);
  const bool captured = capturing();
  if (segment.pins != 0) {
    segment.freed = true;
    segment.pool->bytes_deferred += segment.size;
  } else {
    retire(segment, captured);
  }
  release_unused();
}

// The end of a segment: its range goes once no kernel can touch it.
void State::retire(Segment& segment, bool captured) {
  Pool& owner = *segment.pool;
  if (asleep(owner)) {
    // What sleeps is touched by nobody, so nothing waits.
    owner.give(segment.offset, segment.size);
  } else {
    freed_.push(owner, segment.offset, segment.size, captured);
    freed_.poll(captured);
  }
  segments_.erase(segment.address());
}

void State::pin(CUdeviceptr address) {
  Segment& segment = find_around(address);
  if (asleep(*segment.pool)) raise(RA_TAG_ASLEEP, "the segment is asleep: wake its tag before registering it");
  if (segment.freed) raise(RA_FOREIGN_POINTER, "the segment at this address was freed");
  ++segment.pins;
}

void State::unpin(CUdeviceptr address) {
  Segment& segment = find_around(address);
  if (segment.pins == 0) raise(RA_REGISTERED, "the segment at this address is not registered");
  if (--segment.pins != 0 || !segment.freed) return;
  segment.pool->bytes_deferred -= segment.size;
  retire(segment, capturing());
  release_unused();
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

uint64_t State::release_spare(uint64_t nbytes, uint32_t tags) {
  uint64_t released = 0;
  for (auto& [address, segment] : segments_) {
    if ((tags & bit(segment.pool->tag)) == 0 || asleep(*segment.pool)) continue;
    for (MasterChunk& chunk : segment.master) {
      if (released >= nbytes) return released;
      if (chunk.host) released += chunk.host->nbytes;
      masters_.drop(chunk);
    }
  }
  return released;
}

uint64_t State::release_masters(uint32_t tags) {
  const uint64_t before = masters_.arena().bytes_registered();
  release_spare(UINT64_MAX, tags);
  masters_.arena().trim();
  tell_releasable();
  return before - masters_.arena().bytes_registered();
}

uint64_t State::place_masters(bool on_disk) {
  masters_.prefer_disk(on_disk);
  if (!on_disk) return 0;
  uint64_t moved = 0;
  for (auto& [address, segment] : segments_) moved += masters_.move_to_disk(segment);
  masters_.arena().trim();
  tell_releasable();
  return moved;
}

void State::tell_releasable() {
  SharedBudget* shared = masters_.arena().shared_budget();
  if (shared == nullptr) return;
  uint64_t nbytes = 0;
  for (const auto& [address, segment] : segments_) {
    if (asleep(*segment.pool)) continue;
    for (const MasterChunk& chunk : segment.master) nbytes += chunk.host ? chunk.host->nbytes : 0;
  }
  shared->set_releasable(nbytes);
}

// After this no work that was queued before can touch what these pools hold.
void State::quiesce(const std::vector<Pool*>& pools) {
  const bool captured = capturing();
  if (captured) raise(RA_CAPTURING, "a graph capture is running: end it first");
  freed_.drain(captured);
  std::set<Device*> seen;
  for (Pool* pool : pools) {
    if (!seen.insert(&pool->device).second) continue;
    ContextScope scope(pool->device);
    RA_TRY(driver_, CtxSynchronize);
  }
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
  if (nbytes != 0) RA_TRY(driver_, MemcpyHtoDAsync, address + offset, data, nbytes, on.fill.get());
  RA_TRY(driver_, StreamSynchronize, on.fill.get());
}

void State::read(CUdeviceptr address, std::size_t offset, void* data, std::size_t nbytes) {
  Device& on = accessible(address, offset, nbytes).pool->device;
  ContextScope scope(on);
  if (nbytes != 0) RA_TRY(driver_, MemcpyDtoHAsync, data, address + offset, nbytes, on.fill.get());
  RA_TRY(driver_, StreamSynchronize, on.fill.get());
}

std::vector<ra_usage> State::usage() const {
  std::map<const Pool*, ra_usage> rows;
  for (const auto& [key, pool] : pools_) {
    if (!pool || (key.first == kStaging && pool->bytes_held() == 0)) continue;
    ra_usage row{};
    row.tag = key.first;
    row.device = key.second;
    row.asleep = asleep(*pool);
    row.bytes_mapped = pool->bytes_held();
    row.bytes_peak = pool->bytes_peak();
    row.bytes_deferred = pool->bytes_deferred;
    rows.emplace(pool.get(), row);
  }
  for (const auto& [address, segment] : segments_) {
    ra_usage& row = rows.at(segment.pool);
    for (const MasterChunk& chunk : segment.master) {
      row.bytes_masters += chunk.host ? chunk.host->nbytes : 0;
      row.bytes_spilled += chunk.disk ? chunk.disk->nbytes : 0;
    }
    if (segment.freed) continue;
    row.segments += 1;
    row.bytes_allocated += segment.nbytes;
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
  const HostUsage host = masters_.arena().usage();
  const SpillStore* spill = masters_.spill();
  const uint64_t spilled = spill != nullptr ? spill->bytes_used() : 0;
  return {host.bytes_registered, host.bytes_used, host.bytes_budget, host.bytes_shared_used, host.bytes_limit, spilled};
}

}  // namespace rotator

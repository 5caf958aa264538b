// Masters: which segments need a copy to the host before their device bytes may go, and taking those copies.
#include <set>

#include "csrc/clock.h"
#include "csrc/error.h"
#include "csrc/state.h"

namespace rotator {

// After this no work that was queued before can touch a segment.
void State::quiesce(uint32_t tags) {
  const bool captured = capturing();
  if (captured) raise(RA_CAPTURING, "a graph capture is running: end it first");
  freed_.drain(captured);
  std::set<Device*> seen;
  for (Pool* pool : pools_of(tags)) {
    if (!seen.insert(&pool->device).second) continue;
    ContextScope scope(pool->device);
    RA_TRY(driver_, CtxSynchronize);
  }
}

bool State::unchanged(const Segment& segment) const {
  if (!segment.master || !segment.master->complete || !segment.master->digest) return false;
  Digest on_device;
  if (driver_.SimDigest(segment.address(), segment.nbytes, on_device.words) != CUDA_SUCCESS) return false;
  return on_device == *segment.master->digest;
}

std::vector<State::Copy> State::plan_copies(uint32_t tags, ra_report& report) {
  std::vector<Copy> copies;
  for (auto& [address, segment] : segments_) {
    if ((tags & bit(segment.pool->tag)) == 0) continue;
    ContextScope scope(segment.pool->device);
    if (unchanged(segment)) {
      report.bytes_unchanged += segment.nbytes;
    } else {
      copies.push_back({&segment, !segment.master.has_value()});
    }
  }
  return copies;
}

// One extent for all that is missing on a device, so that registering costs one call.
void State::reserve_blocks(std::vector<Copy>& copies) {
  std::map<Device*, std::size_t> missing;
  for (const Copy& copy : copies)
    if (copy.fresh) missing[&copy.segment->pool->device] += HostArena::block_bytes(copy.segment->nbytes);
  for (auto& [on, nbytes] : missing) {
    ContextScope scope(*on);
    arena_.reserve(*on, nbytes);
  }
  for (Copy& copy : copies) {
    if (!copy.fresh) continue;
    ContextScope scope(copy.segment->pool->device);
    const HostBlock block = arena_.take_or_grow(copy.segment->pool->device, copy.segment->nbytes);
    copy.segment->master = Master{block, false, std::nullopt};
  }
}

void State::run_copies(const std::vector<Copy>& copies, ra_report& report) {
  std::set<Device*> used;
  for (const Copy& copy : copies) {
    Segment& segment = *copy.segment;
    Device& on = segment.pool->device;
    ContextScope scope(on);
    used.insert(&on);
    segment.master->complete = false;
    segment.master->digest.reset();
    unsigned char* to = segment.master->block.data();
    arena_.each_run(to, segment.nbytes, [&](std::size_t at, std::size_t nbytes) {
      RA_TRY(driver_, MemcpyDtoHAsync, to + at, segment.address() + at, nbytes, on.stream);
    });
  }
  for (Device* on : used) {
    ContextScope scope(*on);
    RA_TRY(driver_, StreamSynchronize, on->stream);
  }
  for (const Copy& copy : copies) {
    Segment& segment = *copy.segment;
    segment.master->complete = true;
    if (driver_.SimDigest != nullptr) segment.master->digest = digest_of(segment.master->block.data(), segment.nbytes);
    report.bytes_copied += segment.nbytes;
  }
}

// On failure every segment is as before, and the masters taken for it are gone again.
void State::take_masters(uint32_t tags, ra_report& report) {
  const Stopwatch watch;
  std::vector<Copy> copies = plan_copies(tags, report);
  try {
    reserve_blocks(copies);
    run_copies(copies, report);
  } catch (...) {
    // Copies that are still running write into the blocks about to go.
    for (auto& [index, on] : devices_)
      if (on) driver_.StreamSynchronize(on->stream);
    for (const Copy& copy : copies)
      if (copy.fresh) drop_master(*copy.segment);
    arena_.trim();
    throw;
  }
  report.copy_seconds += watch.seconds();
}

void State::prepare(uint32_t tags, ra_report& report) {
  const Stopwatch watch;
  const uint32_t awake = tags & ~asleep_;
  quiesce(awake);
  report.fence_seconds = watch.seconds();
  take_masters(awake, report);
  report.seconds = watch.seconds();
}

}  // namespace rotator

// Wake: create, map, give access, copy back; every step in a journal, nothing marked awake before all copies ended.
#include <set>

#include "csrc/clock.h"
#include "csrc/error.h"
#include "csrc/state.h"

namespace rotator {

// Slots of one pool that a live segment needs, as runs.
static void back_used(Pool& pool, Journal& journal) {
  for (std::size_t i = 0; i < pool.slots.size();) {
    std::size_t end = i;
    while (end < pool.slots.size() && pool.slots[end].bytes_used != 0) ++end;
    if (end > i) pool.back(i, end, journal);
    i = end + 1;
  }
}

void State::restore_segment(Segment& segment, ra_report& report) {
  Pool& pool = *segment.pool;
  // Only a sleep that could not be rolled back leaves bytes behind their handles.
  if (pool.intact(segment.offset, segment.size)) return;
  if (segment.master && segment.master->complete) {
    const unsigned char* from = segment.master->block.data();
    arena_.each_run(from, segment.nbytes, [&](std::size_t at, std::size_t nbytes) {
      RA_TRY(driver_, MemcpyHtoDAsync, segment.address() + at, from + at, nbytes, pool.device.stream);
    });
    report.bytes_copied += segment.nbytes;
    return;
  }
  // Discarded pages must not come back with what another process left in them.
  RA_TRY(driver_, MemsetD8Async, segment.address(), 0, segment.size, pool.device.stream);
  report.bytes_discarded += segment.nbytes;
}

// Pools come in tag order, weights first, so their copies run while the other tags are being mapped.
void State::restore(const std::vector<Pool*>& pools, Journal& journal, ra_report& report) {
  for (Pool* pool : pools) {
    ContextScope scope(pool->device);
    const Stopwatch mapping;
    back_used(*pool, journal);
    report.map_seconds += mapping.seconds();
    for (auto& [address, segment] : segments_)
      if (segment.pool == pool) restore_segment(segment, report);
  }
  synchronize(pools);
  report.bytes_device = journal.bytes_created();
}

void State::synchronize(const std::vector<Pool*>& pools) {
  std::set<Device*> seen;
  for (Pool* pool : pools) {
    if (!seen.insert(&pool->device).second) continue;
    ContextScope scope(pool->device);
    RA_TRY(driver_, StreamSynchronize, pool->device.stream);
  }
}

static uint64_t bytes_wanted_on(const std::vector<Pool*>& pools, const Device& device) {
  uint64_t wanted = 0;
  for (const Pool* pool : pools)
    if (&pool->device == &device) wanted += pool->bytes_for_wake();
  return wanted;
}

// The first device that cannot hold what its tags want, in the words of someone who has to make room.
static void explain(Error& error, const std::vector<Pool*>& pools) {
  for (const Pool* pool : pools) {
    error.bytes_wanted = bytes_wanted_on(pools, pool->device);
    error.bytes_free = pool->device.bytes_free();
    if (error.bytes_wanted > error.bytes_free) return;
  }
}

void State::wake(uint32_t tags, bool strict, ra_report& report) {
  if ((tags & ~kAllTags) != 0 || tags == 0) raise(RA_UNKNOWN_TAG, "unknown tag, or no tag at all");
  const uint32_t asleep_now = tags & asleep_;
  if (asleep_now == 0 || (strict && asleep_now != tags)) raise(RA_NOT_ASLEEP, "not asleep");
  if (capturing()) raise(RA_CAPTURING, "a graph capture is running: end it first");
  const Stopwatch watch;
  const std::vector<Pool*> pools = pools_of(asleep_now);
  Journal journal;
  try {
    restore(pools, journal, report);
  } catch (Error& error) {
    // Copies in flight must end before their pages go.
    for (const Pool* pool : pools) driver_.StreamSynchronize(pool->device.stream);
    journal.undo();
    if (error.code == RA_OUT_OF_MEMORY) explain(error, pools);
    throw;
  }
  journal.commit();
  asleep_ &= ~asleep_now;
  report.copy_seconds = watch.seconds() - report.map_seconds;
  report.seconds = watch.seconds();
}

}  // namespace rotator
